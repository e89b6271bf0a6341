"""Few-step distillation in the host: the teacher is the model itself, the student is it with the LoRA that is trained.
Both share the weights."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from torch import Tensor

from ...checks import check_finite
from ...errors import Step1XError
from ...files import content_key
from ...images import to_uint8
from ...training.cache import Cache, CachedPair, EditDataset
from ...training.distillation import (
    CACHED,
    FINAL,
    TEACHER,
    Distillation,
    cached_example,
    draw_example,
    draw_segment,
    follow,
    mean_velocity,
    robust_loss,
    student_sigmas,
    teacher_sigmas,
    token_weights,
    trajectory_noise,
)
from ...training.objective import Settings
from ..sampling.few_steps import model_version, version_defaults
from ..sampling.sampler import check_model, norm_limiter, official_limiter
from .adapted import switched_off
from .cache import fingerprint
from .run import Run
from .train import in_groups, join, predict

log = logging.getLogger(__name__)

# In the dataset's cache. The name keeps it out of what a dataset node tidies up.
FOLDER = "trajectories"


def plain_velocity(model, conditioning: tuple[Tensor, dict]) -> Callable[[Tensor, float], Tensor]:
    """The model's velocity at CFG 1 without the limiter. conditioning: of as many rows as the latents have."""
    return lambda x, s: predict(model, x, torch.full((len(x),), s, device=x.device), conditioning)


def guided_velocity(
    model, positive: tuple[Tensor, dict], negative: tuple[Tensor, dict], cfg: float
) -> Callable[[Tensor, float], Tensor]:
    """The velocity that the sampler follows with this model and CFG, norm-limited as there."""
    limiter, limits_cfg1 = norm_limiter(model) or official_limiter(model), model_version(model).uncond_at_cfg1
    towards, away = plain_velocity(model, positive), plain_velocity(model, negative)

    def velocity(x: Tensor, s: float) -> Tensor:
        sigma = torch.full((1, 1, 1, 1), s)
        if cfg == 1 and not (limits_cfg1 and limiter.active(sigma)):
            return towards(x, s)
        unconditional = away(x, s)
        difference = towards(x, s) - unconditional
        return unconditional + cfg * (difference / limiter.divisor(difference, sigma.to(x.device)))

    return velocity


@contextmanager
def no_training() -> Iterator[None]:
    """The host may use its fastest kernels meanwhile."""
    earlier, comfy.model_management.in_training = comfy.model_management.in_training, False
    try:
        with torch.no_grad():
            yield
    finally:
        comfy.model_management.in_training = earlier


class Lesson:
    """What a distillation learns, for `train`. model: the teacher; settings: teacher_steps and teacher_cfg of 0 stand
    for its version's.

    report: called as (done, total) while trajectories are made; made: how many had to be made by `prepare`.

    Raises Step1XError for a model of another kind and for settings that make no training.
    """

    def __init__(self, model, settings: Distillation, report: Callable[[int, int], None] | None = None):
        check_model(model)
        steps, cfg = version_defaults(model, settings.teacher_steps, settings.teacher_cfg)
        self.settings = settings.for_teacher(steps, cfg)
        self.settings.check()
        self.metadata = self.settings.metadata(model.model.diffusion_model.version)
        limiter = norm_limiter(model) or official_limiter(model)
        self.teacher = content_key(
            fingerprint(model, model.model.diffusion_model),
            limiter.truncate,
            limiter.power,
            self.settings.substeps,
            self.settings.stored,
            f"{cfg:g}",
        )
        self.name, self.report, self.made = self.settings.text(), report, 0

    def cache(self, dataset: EditDataset) -> Cache:
        return dataset.cache.beside(FOLDER)

    def key(self, item: CachedPair, seed: int, number: int) -> str:
        """The name of trajectory `number` of a pair in the cache."""
        return content_key(self.teacher, item.conditioning, item.negative, item.source, *item.size, seed, number)

    def noise(self, model, item: CachedPair, seed: int, number: int) -> Tensor:
        """Its first point, float32 [1, C, h, w]; the same wherever the pair stands in the dataset."""
        return trajectory_noise(
            seed, int(item.content[:16] or "0", 16), number, (1, model.model.latent_channels, *item.size)
        )

    def points(self, model, dataset: EditDataset, item: CachedPair, seed: int, number: int) -> Tensor:
        """The trajectory at the student's noise levels, noise first, float32 [steps + 1, C, h, w]."""
        later = self.cache(dataset).load(self.key(item, seed, number))["points"]
        return torch.cat(
            [
                self.noise(model, item, seed, number).to(later.device),
                later[self.settings.stride - 1 :: self.settings.stride].float(),
            ]
        )

    def prepare(self, model, dataset: EditDataset, settings: Settings) -> None:
        """Make the trajectories that the cache lacks, `settings.batch` at a time; each batch is stored at once, so a
        cancelled run is resumed.

        Raises Step1XError for a dataset without negative conditionings, for NaN, and for a full disk, and the host's
        exception on cancel.
        """
        if any(item.negative is None for item in dataset.pairs):
            raise Step1XError(
                "A few-step LoRA is trained on sources and instructions alone, but the dataset was encoded as pairs. "
                "Turn on 'sources_only' in 'Step1X-Edit Dataset'."
            )
        cache = self.cache(dataset)
        wanted = [(item, number) for item in dataset.pairs for number in range(self.settings.noises)] + [
            (item, 0) for item in dataset.validation
        ]
        keys = {self.key(item, settings.seed, number): (item, number) for item, number in wanted}
        missing = {key: found for key, found in keys.items() if key not in cache}
        self.made = len(missing)
        if missing:
            log.info(
                "Step1X-Edit samples %d trajectories of the teacher; %d are in the cache",
                len(missing),
                len(keys) - len(missing),
            )
            with torch.inference_mode():
                self.sample_missing(model, dataset, settings, missing)
        cache.prune(set(keys))

    def sample_missing(
        self, model, dataset: EditDataset, settings: Settings, missing: dict[str, tuple[CachedPair, int]]
    ) -> None:
        cache, progress = self.cache(dataset), comfy.utils.ProgressBar(len(missing))
        # Shapes that can be computed together stand together.
        todo = sorted(missing.items(), key=lambda entry: entry[1][0].size)
        height, width = max((item.size for item, _ in missing.values()), key=lambda size: size[0] * size[1])
        working = model.memory_required([settings.batch, model.model.latent_channels, height, 2 * width])
        comfy.model_management.load_models_gpu([model], memory_required=working)
        for first in range(0, len(todo), settings.batch):
            comfy.model_management.throw_exception_if_processing_interrupted()
            part = todo[first:first + settings.batch]
            rows = [
                (self.noise(model, item, settings.seed, number), key, item, dataset.conditioning(item))
                for key, (item, number) in part
            ]
            for group in in_groups(rows):
                noises, names, items, conditionings = zip(*group)
                for key, points in zip(
                    names,
                    self.trajectories(
                        model, dataset, torch.cat(noises).to(model.load_device), list(items), list(conditionings)
                    ),
                ):
                    cache.store(key, {"points": points})
            progress.update(len(part))
            if self.report is not None:
                self.report(first + len(part), len(todo))

    def trajectories(
        self, model, dataset: EditDataset, noise: Tensor, items: list[CachedPair], conditionings: list
    ) -> Tensor:
        """noise [B, C, h, w] -> the teacher's latents at the stored noise levels, float16 [B, stored, C, h, w] on the
        CPU.

        Raises Step1XError for NaN.
        """
        sigmas = teacher_sigmas(self.settings, *noise.shape[-2:])
        points = follow(self.guided(model, dataset, items, conditionings), noise, sigmas, self.settings.substeps)
        stacked = torch.stack(points, dim=1)
        check_finite(
            stacked,
            "The teacher's sampling returned NaN or Inf values. The model's file may be damaged, or float16 may "
            "overflow. "
            "Try the model without LoRAs, or download it again.",
        )
        return stacked.to("cpu", torch.float16)

    def guided(
        self, model, dataset: EditDataset, items: list[CachedPair], conditionings: list
    ) -> Callable[[Tensor, float], Tensor]:
        negatives = join([dataset.conditioning(item, negative=True) for item in items])
        return guided_velocity(model, join(conditionings), negatives, self.settings.teacher_cfg)

    def losses(
        self, model, dataset: EditDataset, items: list[CachedPair], positions: list[int], run: Run
    ) -> Iterator[Tensor]:
        """The losses of these examples, [n] each time, in groups of equal shapes. positions: of the examples in the
        training."""
        settings, seed = self.settings, run.settings.seed
        rows = []
        for item, position in zip(items, positions):
            example = draw_example(settings, seed, position)
            points = self.points(model, dataset, item, seed, example.noise)
            source = model.model.process_latent_in(dataset.source(item))
            weights = token_weights(points[-1:], source.to(points.device), settings.weight)
            rows.append((points, example, weights, item, dataset.conditioning(item)))
        later = settings.later if run.step >= (1 - settings.share) * run.settings.steps else CACHED
        segment = draw_segment(settings, seed, positions[0])
        for group in in_groups(rows):
            points, examples, weights, members, conditionings = zip(*group)
            points, weights = torch.stack(points).to(model.load_device), torch.cat(weights).to(model.load_device)
            student = plain_velocity(model, join(list(conditionings)))
            if later == FINAL:
                yield self.final_losses(student, points, weights)
            # The first points of all are noise. Those of a LoRA for late steps alone need the LoRA of the early ones.
            elif later == CACHED or segment == 0 or settings.first:
                yield self.cached_losses(model, join(list(conditionings)), points, weights, examples)
            else:
                teacher = self.guided(model, dataset, list(members), list(conditionings)) if later == TEACHER else None
                yield self.own_losses(student, teacher, points, weights, segment, run)

    def cached_losses(self, model, conditioning, points: Tensor, weights: Tensor, examples) -> Tensor:
        """Against each segment's mean velocity, from points of the teacher's trajectories. points [B, steps + 1, C, h,
        w] -> [B]."""
        sigmas = student_sigmas(self.settings, *points.shape[-2:])
        drawn = [
            cached_example(row, sigmas.to(row.device), example.segment, example.fraction)
            for row, example in zip(points, examples)
        ]
        x, s, velocity = (torch.stack(part) for part in zip(*drawn))
        return robust_loss(predict(model, x, s, conditioning), velocity, weights)

    def own_losses(self, student, teacher, points: Tensor, weights: Tensor, segment: int, run: Run) -> Tensor:
        """From the point that the student's own steps reach: to where the teacher gets from there or, where it is None,
        back to its trajectory."""
        sigmas = student_sigmas(self.settings, *points.shape[-2:])
        s, following = sigmas[segment].item(), sigmas[segment + 1].item()
        with no_training():
            own = follow(student, points[:, 0], sigmas[:segment + 1])[-1] if segment else points[:, 0]
            end = points[:, segment + 1]
            if teacher is not None:
                substeps = self.settings.substeps * self.settings.stride
                levels = teacher_sigmas(self.settings, *points.shape[-2:])[
                    segment * substeps : (segment + 1) * substeps + 1
                ]
                with switched_off(run.layers):
                    end = follow(teacher, own, levels)[-1]
        return robust_loss(student(own, s), mean_velocity(own, end, s, following), weights)

    def final_losses(self, student, points: Tensor, weights: Tensor) -> Tensor:
        """The last latent of the student's own steps against the teacher's, with gradients through all of them."""
        final = follow(student, points[:, 0], student_sigmas(self.settings, *points.shape[-2:]))[-1]
        return robust_loss(final, points[:, -1], weights)

    def compare_held_out(self, model, vae, dataset: EditDataset, seed: int) -> list[np.ndarray]:
        """The validation items: source, the student's edit and the teacher's side by side, uint8 [H, 3 W, 3] each. The
        LoRA has to be in place."""
        rows = []
        for item in dataset.validation:
            points = self.points(model, dataset, item, seed, 0)
            student = plain_velocity(model, join([dataset.conditioning(item)]))
            final = follow(student, points[:1].to(model.load_device), student_sigmas(self.settings, *item.size))[-1]
            latents = [model.model.process_latent_out(latent.float().cpu()) for latent in (final, points[-1:])]
            rows.append(
                to_uint8(
                    torch.cat([vae.decode(latent.clone())[0] for latent in (dataset.source(item), *latents)], dim=1)
                )
            )
        return rows
