"""The resolution-dependent flow schedule (docs/model.md, Schedule)."""

import math

import torch
from torch import Tensor

# FLUX's shift line: 0.5 at 256 tokens, 1.15 at 4096 tokens.
BASE_SHIFT, MAX_SHIFT = 0.5, 1.15
BASE_TOKENS, MAX_TOKENS = 256, 4096


def shift_mu(tokens: int) -> float:
    """Shift exponent for a number of target tokens (16x16-pixel patches; the reference does not count). Not clamped."""
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    return slope * tokens + BASE_SHIFT - slope * BASE_TOKENS


def latent_tokens(latent_height: int, latent_width: int) -> int:
    """Transformer tokens of a latent of this size; an odd side counts as padded to the next even one."""
    return math.ceil(latent_height / 2) * math.ceil(latent_width / 2)


def sigma_schedule(steps: int, tokens: int | None = None) -> Tensor:
    """Noise levels [steps + 1] in float32, from 1 down to 0. Without `tokens` the schedule is not shifted."""
    t = torch.linspace(1, 0, steps + 1)
    if tokens is None:
        return t
    scale = math.exp(shift_mu(tokens))
    return scale / (scale + (1 / t - 1))


def image_to_image_start(steps: int, denoise: float) -> int:
    """Index of the first step when only the part `denoise` (0..1) of the schedule is run."""
    return int((1 - denoise) * steps)
