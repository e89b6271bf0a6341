"""Few-step distillation: a teacher's trajectories at the student's noise levels, and what a student learns from them.

The teacher follows the flow from noise to the edited latent in many guided steps. The student makes one step of each
segment of that path, so what it has to predict is the mean velocity over the segment. Everything here is independent of
ComfyUI; `velocity` functions are called as (x, s).
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..errors import Step1XError
from ..sampling.few_steps import FewSteps
from ..sampling.schedule import latent_tokens, sigma_schedule
from .objective import generator

MAX_STEPS = 8
# How the later part of a training chooses its points and targets.
CACHED, TEACHER, TRAJECTORY, FINAL = "cached", "teacher", "trajectory", "final"
STAGES = (CACHED, TEACHER, TRAJECTORY, FINAL)
# Where the pseudo-Huber loss turns from squares to absolute values, in units of the velocity, which is about 1.
HUBER = 0.05
# Root mean square change of a latent token, in units of the latent, that counts as fully edited.
EDITED = 0.5
# Streams of random numbers of one seed, beside those of `objective`.
TRAJECTORIES, EXAMPLES = 10, 11
STUDENT_CFG = 1.0


@dataclass(frozen=True)
class Distillation:
    """What a few-step LoRA is taught.

    steps: of the student, 1 to 8. teacher_steps, teacher_cfg: of the teacher, 0 for its version's.
    grid: points of a trajectory that are stored, a multiple of steps; 0: 8 where that is one, so that students of 1, 2,
    4 and 8 steps share their trajectories, else steps. The teacher's steps are rounded up to a multiple of it.
    noises: trajectories of each pair. later: one of STAGES, for the last part of the training; share: how much of the
    training that is.
    between: share of the examples that start between two points of the trajectory. weight: additional weight of fully
    edited tokens.
    first, last: the student's steps that are trained, for a LoRA of a part of them; last 0 stands for all.
    """

    steps: int = 4
    teacher_steps: int = 0
    teacher_cfg: float = 0.0
    grid: int = 0
    noises: int = 1
    later: str = TRAJECTORY
    share: float = 0.5
    between: float = 0.25
    weight: float = 2.0
    first: int = 0
    last: int = 0

    def for_teacher(self, steps: int, cfg: float) -> "Distillation":
        """The same with the teacher's settings resolved."""
        return replace(self, teacher_steps=steps, teacher_cfg=cfg)

    def check(self) -> None:
        """Raise Step1XError for values that make no training."""
        if not 1 <= self.steps <= MAX_STEPS:
            raise Step1XError(
                f"A few-step LoRA takes 1 to {MAX_STEPS} steps, but few_steps is {self.steps}. Choose a number in that range."
            )
        if self.teacher_steps < 2 * self.steps:
            raise Step1XError(f"The teacher makes {self.teacher_steps} steps and the student {self.steps}. "
                              "Raise teacher_steps to at least twice few_steps, or lower few_steps.")
        if self.stored % self.steps:
            raise Step1XError(
                f"A grid of {self.stored} points does not hold those of {self.steps} steps. Choose a multiple of few_steps."
            )
        if self.later not in STAGES:
            raise Step1XError(f"There is no stage {self.later!r} of a distillation. Choose one of {', '.join(STAGES)}.")

    @property
    def stored(self) -> int:
        """Points of a trajectory that are stored."""
        return self.grid or (MAX_STEPS if MAX_STEPS % self.steps == 0 else self.steps)

    @property
    def stride(self) -> int:
        """Stored points in one step of the student."""
        return self.stored // self.steps

    @property
    def substeps(self) -> int:
        """Steps of the teacher between two stored points."""
        return math.ceil(self.teacher_steps / self.stored)

    @property
    def trained(self) -> range:
        """The student's steps that are trained."""
        return range(self.first, self.last or self.steps)

    def metadata(self, version: str) -> dict[str, str]:
        """What the LoRA's file says of itself. version: of the model. No schedule stands for the version's own, whose
        shift depends on the size of the image."""
        teacher = {"version": version, "steps": self.stored * self.substeps, "cfg": self.teacher_cfg}
        return FewSteps(self.steps, STUDENT_CFG, teacher=teacher).metadata()

    def text(self) -> str:
        """All settings on one line, to compare trainings by."""
        return json.dumps(asdict(self), sort_keys=True)


def student_sigmas(settings: Distillation, height: int, width: int) -> Tensor:
    """The student's noise levels [steps + 1] for a latent of this size, float32, from 1 down to 0."""
    return sigma_schedule(settings.steps, latent_tokens(height, width))


def teacher_sigmas(settings: Distillation, height: int, width: int) -> Tensor:
    """The teacher's noise levels [stored * substeps + 1]: every `substeps * stride`-th is one of the student's."""
    return sigma_schedule(settings.stored * settings.substeps, latent_tokens(height, width))


def follow(velocity: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Tensor, keep: int = 1) -> list[Tensor]:
    """Euler steps along the flow from x [B, C, h, w] at sigmas[0] -> the latents after every `keep`-th step."""
    points = []
    levels = sigmas.tolist()
    for number, (s, following) in enumerate(zip(levels, levels[1:]), 1):
        x = x + (following - s) * velocity(x, s)
        if number % keep == 0:
            points.append(x)
    return points


def trajectory_noise(seed: int, pair: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """The noise that trajectory `number` of a pair begins with, float32."""
    return torch.randn(shape, generator=generator(seed, TRAJECTORIES, pair, number))


@dataclass(frozen=True)
class Example:
    """What one example of the training is. noise: number of the trajectory; segment: of the student's steps; fraction:
    how far into the segment, 0 is its start."""

    noise: int
    segment: int
    fraction: float


def draw_example(settings: Distillation, seed: int, position: int) -> Example:
    """The training's example number `position`; the same on every call."""
    numbers = generator(seed, EXAMPLES, position)
    noise = int(torch.randint(settings.noises, (), generator=numbers))
    segment = settings.trained[int(torch.randint(len(settings.trained), (), generator=numbers))]
    inside, fraction = torch.rand(2, generator=numbers).tolist()
    return Example(noise, segment, fraction if inside < settings.between else 0.0)


def draw_segment(settings: Distillation, seed: int, step: int) -> int:
    """The segment that a whole step of the training is on, where all of its examples have to be on one."""
    numbers = generator(seed, EXAMPLES, step, 1)
    return settings.trained[int(torch.randint(len(settings.trained), (), generator=numbers))]


def cached_example(points: Tensor, sigmas: Tensor, segment: int, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """A point of a segment, its noise level and the segment's mean velocity.

    points [steps + 1, C, h, w]: a trajectory, noise first; sigmas [steps + 1]. The point lies on the straight line
    between the segment's ends.
    -> x [C, h, w], s [], velocity [C, h, w].
    """
    start, end = points[segment], points[segment + 1]
    s, following = sigmas[segment], sigmas[segment + 1]
    return start.lerp(end, fraction), s.lerp(following, fraction), mean_velocity(start, end, s, following)


def mean_velocity(start: Tensor, end: Tensor, s: Tensor | float, following: Tensor | float) -> Tensor:
    """The constant velocity that leads from `start` at noise level s to `end` at the following one."""
    return (start - end) / (s - following)


def token_mean(values: Tensor) -> Tensor:
    """Mean over channels and 2x2 patches, [B, C, h, w] -> [B, h/2, w/2], rounded up; what an odd side lacks does not
    count."""
    return torch.nn.functional.avg_pool2d(values.mean(dim=1, keepdim=True), 2, ceil_mode=True, count_include_pad=False)[
        :, 0
    ]


def token_weights(final: Tensor, source: Tensor, weight: float) -> Tensor:
    """How much each token counts: more where the teacher changed the source. final, source [B, C, h, w] -> [B, h/2,
    w/2] with a mean of 1 in each row."""
    change = token_mean((final - source).float().square()).sqrt()
    weights = 1 + weight * (change / EDITED).clamp(max=1)
    return weights / weights.mean(dim=(1, 2), keepdim=True)


def robust_loss(found: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Pseudo-Huber loss of each token, weighted. found, wanted [B, C, h, w]; weights [B, h/2, w/2] -> float32 [B].

    The error of a token is a root mean square: unlike a mean of squares it does not let a few tokens that the teacher
    fills almost at random decide all.
    """
    errors = token_mean((found.float() - wanted.float()).square())
    return (weights * ((errors + HUBER**2).sqrt() - HUBER)).mean(dim=(1, 2))
