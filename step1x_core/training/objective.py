"""Training a LoRA on pairs of pictures: objective, noise levels, layers, order of the pairs and the kohya layout
(docs/model.md, LoRA training)."""

import logging
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Step1XError

log = logging.getLogger(__name__)

# Official defaults.
RANK = 64
ALPHA = 32.0
LEARNING_RATE = 1e-4
NOISE_SHIFT = 3.1582
# Of the optimiser and of kohya's trainer.
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0

CONSTANT, COSINE = "constant", "cosine"
SCHEDULES = (CONSTANT, COSINE)

# All linear layers of the blocks with their modulation, 304 in the published models; connector, embedders and final
# layer stay as they are.
TARGET = re.compile(
    r"double_blocks\.\d+\.(img|txt)_(mod\.lin|attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.(linear[12]|modulation\.lin)"
)
KOHYA_PREFIX = "lora_unet_"

# Independent streams of random numbers of one seed.
ORDER, NOISE, WEIGHTS = range(3)


@dataclass(frozen=True)
class Settings:
    """One training. steps: updates of the weights; each averages batch * accumulation pairs. warmup: steps in which the
    learning rate rises. ema: decay, 0 is off."""

    steps: int
    learning_rate: float = LEARNING_RATE
    rank: int = RANK
    alpha: float = ALPHA
    batch: int = 1
    accumulation: int = 1
    seed: int = 0
    schedule: str = CONSTANT
    warmup: int = 0
    ema: float = 0.0

    @property
    def pairs_per_step(self) -> int:
        return self.batch * self.accumulation


# What must not change when a training goes on: the stored tensors have these shapes, or would mean something else.
FIXED = ("rank", "alpha", "seed", "batch", "accumulation", "ema")


def check_resumed(stored: dict, settings: Settings, place: str) -> None:
    """Raise Step1XError where a stored training cannot go on with these settings. stored: the earlier settings as a
    dict; place: where it was found."""
    for name in FIXED:
        now = getattr(settings, name)
        if stored.get(name) != now:
            raise Step1XError(f"The run in {place} uses {name} {stored.get(name)}, but {name} is now {now}. "
                              f"Use {stored.get(name)}, choose another name, or turn resume off to start over.")


@dataclass(frozen=True)
class Origin:
    """What a LoRA is trained on. dataset: the fingerprint of its pairs; version: of the model; lesson: the settings of
    a distillation, "" for pairs."""

    dataset: str = ""
    version: str = ""
    lesson: str = ""


def check_origin(stored: dict, origin: Origin, place: str) -> None:
    """Raise Step1XError where a stored training was on another dataset or for another version. stored: as the state
    names them; place: where it was found.

    A state of an earlier release that does not name them is taken on, with a line in the log.
    """
    version, dataset = stored.get("version"), stored.get("dataset")
    advice = "Choose another name, or turn resume off to start over; the earlier run is then moved aside."
    if version is not None and version != origin.version:
        raise Step1XError(
            f"The run in {place} is for Step1X-Edit {version}, but the model is {origin.version}. {advice}"
        )
    if dataset is not None and dataset != origin.dataset:
        raise Step1XError(f"The run in {place} uses another dataset, size level or number of held-out pairs. {advice}")
    if stored.get("lesson", "") != origin.lesson:
        raise Step1XError(f"The run in {place} was trained in another mode or with other few-step settings. {advice}")
    if version is None or dataset is None:
        log.warning("The run in %s is from an earlier release and does not name its dataset or version. "
                    "It is resumed with the current ones.", place)


def generator(seed: int, *stream: int) -> torch.Generator:
    """Random numbers that depend on nothing but the seed and the numbers of the stream, so that a training can go on
    anywhere."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0]))


def shift_noise_level(s: Tensor) -> Tensor:
    """More weight to high noise levels; 0 and 1 stay."""
    return NOISE_SHIFT * s / (1 + (NOISE_SHIFT - 1) * s)


def draw(seed: int, position: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Noise level [1] in 0..1 and noise of this shape, float32, for the training's pair number `position`."""
    numbers = generator(seed, NOISE, position)
    return shift_noise_level(torch.sigmoid(torch.randn(1, generator=numbers))), torch.randn(shape, generator=numbers)


def add_noise(x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    """x0, noise [B, C, h, w], s [B] in 0..1 -> x_t = (1 - s) x0 + s noise."""
    s = s[:, None, None, None]
    return (1 - s) * x0 + s * noise


def flow_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of each velocity [B, C, h, w] against noise - x0, float32 [B]."""
    return (velocity.float() - (noise - x0)).square().mean(dim=(1, 2, 3))


def pair_at(seed: int, position: int, count: int) -> int:
    """Which of `count` pairs is number `position` of the training: every epoch takes all of them in another order."""
    epoch, place = divmod(position, count)
    return int(torch.randperm(count, generator=generator(seed, ORDER, epoch))[place])


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of a step, from 0: a linear rise over the warm-up, then constant or half a cosine down to 0 at
    the last step."""
    rate = settings.learning_rate * min(1.0, (step + 1) / (settings.warmup + 1))
    if settings.schedule == COSINE and step >= settings.warmup:
        rate *= 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / max(1, settings.steps - settings.warmup)))
    return rate


class LoraLayer(nn.Module):
    """The change of one linear layer: down [rank, in] random, up [out, rank] zero, both float32, scaled by alpha /
    rank."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, numbers: torch.Generator):
        super().__init__()
        bound = inputs**-0.5
        self.down = nn.Parameter(torch.rand((rank, inputs), generator=numbers) * 2 * bound - bound)
        self.up = nn.Parameter(torch.zeros((outputs, rank)))
        self.scale = alpha / rank
        # Off, the layer below gives what it gives without a LoRA.
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x."""
        hidden = nn.functional.linear(x, self.down.to(x.dtype))
        return nn.functional.linear(hidden * self.scale, self.up.to(x.dtype))


def lora_layers(shapes: dict[str, tuple[int, int]], settings: Settings) -> dict[str, LoraLayer]:
    """New layers by name. shapes: (inputs, outputs) by name; those that are no target are left out."""
    names = [name for name in shapes if TARGET.fullmatch(name)]
    return {
        name: LoraLayer(*shapes[name], settings.rank, settings.alpha, generator(settings.seed, WEIGHTS, i))
        for i, name in enumerate(names)
    }


def parameters(layers: dict[str, LoraLayer]) -> dict[str, nn.Parameter]:
    """All weights in a fixed order, as `NAME.down` and `NAME.up`."""
    return {f"{name}.{part}": weight for name, layer in layers.items() for part, weight in layer.named_parameters()}


def to_kohya(weights: dict[str, Tensor], alpha: float, dtype=torch.bfloat16) -> dict[str, Tensor]:
    """Weights as `parameters` names them -> tensors in the official layout, on the CPU."""
    lora = {}
    for name, weight in weights.items():
        module, _, part = name.rpartition(".")
        key = KOHYA_PREFIX + module.replace(".", "_")
        lora[f"{key}.lora_{part}.weight"] = weight.detach().to("cpu", dtype, copy=True).contiguous()
        lora[f"{key}.alpha"] = torch.tensor(float(alpha))
    return lora
