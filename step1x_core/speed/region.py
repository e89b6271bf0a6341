"""Region-aware denoising: after a few full steps, only the tokens that the edit changes are computed (docs/model.md,
Region denoising).

The model's prediction of a token is the denoised latent. In the unedited area it is kept from the last full step; on a
straight path this equals one long step. Within the edited region, a step is skipped if the velocity is predicted to
hardly change, based on measurements in the same run.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

# Fraction of the steps, at the end, that are full.
TAIL = 2 / 28

# Below this shorter side, a token grid is too coarse to tell a speck from a small object.
SPECK_GRID = 32


@dataclass(frozen=True)
class RegionSettings:
    """Settings of region denoising.

    similarity: cosine similarity to the reference, -1..1, up to which a token counts as edited. warmup: fraction of the
    steps, at the start, that are full.
    refreshes: number of full steps in between. reuse: skip a step while the predicted relative change of the velocity
    since it was last computed is below this value; 0 disables this.
    """

    similarity: float = 0.88
    warmup: float = 0.2
    refreshes: int = 1
    reuse: float = 0.02


def full_steps(steps: int, settings: RegionSettings) -> list[bool]:
    """Return which steps of a run compute every token. For 28 steps and default settings: 0 to 5, 15, 26 and 27."""
    first = max(1, round(steps * settings.warmup))
    end = max(first, steps - max(1, round(steps * TAIL)))
    full = [i < first or i >= end for i in range(steps)]
    if first < steps:
        for number in range(settings.refreshes):
            full[first + (end - first) * (number + 1) // (settings.refreshes + 1) - 1] = True
    return full


def step_at(sigma: Tensor, sigmas: Tensor) -> int:
    """Return the index of the step that contains noise level sigma [], or starts at it. sigmas: [steps + 1],
    decreasing."""
    return int((sigmas > sigma).sum())


def token_sum(x: Tensor) -> Tensor:
    """Sum [B, C, h, w] over the channels of each 2x2 patch (one token); returns [B, rows, columns]."""
    height, width = x.shape[-2:]
    return avg_pool2d(pad(x.sum(dim=1), (0, width % 2, 0, height % 2)), 2, divisor_override=1)


def spread(region: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Dilate [B, rows, columns] by a rectangle with odd sides."""
    return max_pool2d(region.float(), kernel, 1, (kernel[0] // 2, kernel[1] // 2)).bool()


def without_specks(region: Tensor) -> Tensor:
    """Remove specks: erode [B, rows, columns] by a 3x3 cross, then dilate by a square of about 1/16 of the shorter side
    (5x5 at 64x64 tokens).

    The area beyond the border counts as edited. Coarse grids are not eroded.
    """
    side = min(region.shape[-2:])
    if side >= SPECK_GRID:
        region = ~(spread(~region, (3, 1)) | spread(~region, (1, 3)))
    width = 2 * max(1, round(side / 32)) + 1
    return spread(region, (width, width))


def edited_tokens(denoised: Tensor, reference: Tensor, similarity: float, mask: Tensor | None = None) -> Tensor:
    """Return where a prediction differs from the reference, bool [B, rows, columns].

    denoised, reference: [B, C, h, w]. mask: [B, C, h, w], 0 where nothing may change.

    If nothing differs, the edit cannot be located and every token counts as edited.
    """
    dot = token_sum(denoised * reference)
    norms = (token_sum(denoised.square()) * token_sum(reference.square())).sqrt()
    edited = without_specks(dot <= similarity * norms)
    if mask is not None:
        edited &= max_pool2d(mask.amax(dim=1), 2, ceil_mode=True) > 0
    return edited | ~edited.flatten(1).any(dim=1)[:, None, None]


def token_rows(edited: Tensor, references: int) -> Tensor:
    """Return the positions of the tokens to compute, int64 [B, n], in the sequence of image and reference tokens.

    An image that is edited everywhere keeps its reference tokens (`references` is their number), so its step is exact.
    Shorter rows repeat their first entry, which is harmless: computing a token twice gives the same result.
    """
    edited = edited.flatten(1)
    edited = torch.cat((edited, edited.all(dim=1, keepdim=True).expand(-1, references)), dim=1)
    counts = edited.sum(dim=1)
    order = edited.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :int(counts.max())]
    return torch.where(torch.arange(order.shape[1], device=order.device) < counts[:, None], order, order[:, :1])


def per_picture(values: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, 1, 1]."""
    return values[:, None, None, None]


class RegionRun:
    """State of one sampling run, separate for each image of the batch. mask: the inpainting mask [B, C, h, w], or
    None."""

    def __init__(self, settings: RegionSettings, steps: int, mask: Tensor | None = None):
        self.settings = settings
        self.full = full_steps(steps, settings)
        self.mask = mask
        self.edited: Tensor | None = None
        # Noise level and results of the last computed step. Change and decay of the velocity are per unit of noise
        # level.
        self.sigma: Tensor | None = None
        self.velocity: Tensor | None = None
        self.denoised: Tensor | None = None
        self.change: Tensor | None = None
        self.decay: Tensor | None = None

    def is_full(self, step: int) -> bool:
        """Return whether this step must compute every token: by the plan, or because no image has an unedited area."""
        return self.edited is None or bool(self.edited.all()) or step >= len(self.full) or self.full[step]

    def precedes_region(self, step: int) -> bool:
        """Return whether this is a planned full step followed by one that is not; its result is then kept."""
        return step + 1 < len(self.full) and self.full[step] and not self.full[step + 1]

    def select(self, denoised: Tensor, reference: Tensor | None) -> None:
        """Choose the tokens to compute from now on, by predictions [B, C, h, w]. Without a reference of the same size
        all steps stay full."""
        self.edited = None
        if reference is not None and reference.shape == denoised.shape:
            # With several GPUs, the reference may be on another one.
            self.edited = edited_tokens(denoised, reference.to(denoised.device), self.settings.similarity, self.mask)

    def region(self) -> Tensor:
        """Return the edited tokens as latent positions, bool [B, 1, h, w]."""
        height, width = self.denoised.shape[-2:]
        if self.edited is None:
            return self.denoised.new_ones((self.denoised.shape[0], 1, height, width), dtype=torch.bool)
        return self.edited.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, None, :height, :width]

    def reusable(self, sigma: Tensor) -> Tensor:
        """Return which images can skip the computation at this noise level, bool [B]."""
        return (self.change * (self.sigma - sigma).abs() < self.settings.reuse) & ~self.edited.flatten(1).all(dim=1)

    def predicted(self, sigma: Tensor) -> Tensor:
        """Predict the denoised latents [B, C, h, w] at this noise level from the last computed velocity and its
        decay."""
        shrunk = 1 - torch.exp(self.decay * (self.sigma - sigma))
        return self.denoised + self.region() * sigma * per_picture(shrunk) * self.velocity

    def merge(self, sigma: Tensor, x: Tensor, denoised: Tensor, reused: Tensor) -> Tensor:
        """Combine a step's result: computed in the region, kept elsewhere, predicted for the images that are `reused`
        [B]."""
        merged = torch.where(self.region(), denoised, self.denoised)
        merged = torch.where(per_picture(reused), self.predicted(sigma), merged)
        self.remember(sigma, x, merged, ~reused)
        return merged

    def remember(self, sigma: Tensor, x: Tensor, denoised: Tensor, computed: Tensor | None = None) -> None:
        """Store the predictions for x at noise level sigma []. computed: [B], for which images (default: all)."""
        velocity = (x - denoised) / sigma
        if self.denoised is None:
            # Copied, because the sampler gets the caller's tensor.
            self.sigma, self.velocity, self.denoised = sigma.expand(x.shape[0]), velocity, denoised.clone()
            self.change, self.decay = torch.full_like(self.sigma, math.inf), torch.zeros_like(self.sigma)
            return
        region = self.region()
        before, after = self.velocity * region, velocity * region
        energy = before.square().flatten(1).sum(dim=1)
        ratio = (before * after).flatten(1).sum(dim=1) / energy
        change = ((after - before).square().flatten(1).sum(dim=1) / energy).sqrt()
        distance = self.sigma - sigma
        computed = torch.ones_like(distance, dtype=torch.bool) if computed is None else computed
        measured = computed & (distance > 0)
        self.change = torch.where(measured, change / distance, self.change)
        # A velocity that reversed has no decay; its change is far too large for it to be reused.
        self.decay = torch.where(measured, ratio.clamp(min=0.1).log() / distance, self.decay)
        self.sigma = torch.where(computed, sigma, self.sigma)
        self.velocity = torch.where(per_picture(computed), velocity, self.velocity)
        self.denoised = torch.where(per_picture(computed), denoised, self.denoised)
