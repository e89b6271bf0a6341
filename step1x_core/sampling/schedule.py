"""The resolution-dependent flow schedule (docs/model.md, Schedule)."""

import math

import torch
from torch import Tensor

# FLUX's shift line: 0.5 at 256 tokens, 1.15 at 4096 tokens.
BASE_SHIFT, MAX_SHIFT = 0.5, 1.15
BASE_TOKENS, MAX_TOKENS = 256, 4096


def shift_mu(tokens: int) -> float:
    """Return the shift exponent for a number of target tokens (16x16-pixel patches, without the reference). Not
    clamped."""
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    return slope * tokens + BASE_SHIFT - slope * BASE_TOKENS


def latent_tokens(latent_height: int, latent_width: int) -> int:
    """Return the number of transformer tokens of a latent of this size; odd sides are padded to the next even size."""
    return math.ceil(latent_height / 2) * math.ceil(latent_width / 2)


def sigma_schedule(steps: int, tokens: int | None = None) -> Tensor:
    """Return the sigmas [steps + 1] in float32, from 1 down to 0. Without `tokens` the schedule is not shifted."""
    t = torch.linspace(1, 0, steps + 1)
    if tokens is None:
        return t
    scale = math.exp(shift_mu(tokens))
    return scale / (scale + (1 / t - 1))


def image_to_image_start(steps: int, denoise: float) -> int:
    """Return the index of the first step if only the fraction `denoise` (0..1) of the schedule is run."""
    return int((1 - denoise) * steps)
