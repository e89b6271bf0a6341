"""Region-aware denoising: after a few full steps only the tokens that the edit changes are computed
(docs/model.md, Region denoising).

The model's prediction of a token is the denoised latent. Where the edit leaves the image alone it is kept from the last full step; with a straight path this is the
same as one long step. Within the edited region a step is left out where the velocity is hardly going to change, as measured in the run itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

# Part of the steps, at the end, that are full.
TAIL = 2 / 28

# Grids of tokens with a shorter side than this are too coarse to tell a speck from a small object.
SPECK_GRID = 32


@dataclass(frozen=True)
class RegionSettings:
    """similarity: cosine -1..1 to the reference up to which a token counts as edited. warmup: part of the steps, at the start, that are full.

    refreshes: full steps in between. reuse: relative change of the velocity, expected since it was last computed, below which a step is left out; 0 for never.
    """

    similarity: float = 0.88
    warmup: float = 0.2
    refreshes: int = 1
    reuse: float = 0.02


def full_steps(steps: int, settings: RegionSettings) -> list[bool]:
    """Which steps of a run compute every token. At 28 steps and default settings: 0 to 5, 15, 26 and 27."""
    first = max(1, round(steps * settings.warmup))
    end = max(first, steps - max(1, round(steps * TAIL)))
    full = [i < first or i >= end for i in range(steps)]
    if first < steps:
        for number in range(settings.refreshes):
            full[first + (end - first) * (number + 1) // (settings.refreshes + 1) - 1] = True
    return full


def step_at(sigma: Tensor, sigmas: Tensor) -> int:
    """Index of the step that begins at noise level sigma [], or within which it lies. sigmas [steps + 1], falling."""
    return int((sigmas > sigma).sum())


def token_sum(x: Tensor) -> Tensor:
    """Sum of [B, C, h, w] over the channels of each 2x2 patch (one token) -> [B, rows, columns]."""
    height, width = x.shape[-2:]
    return avg_pool2d(pad(x.sum(dim=1), (0, width % 2, 0, height % 2)), 2, divisor_override=1)


def spread(region: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Dilation of [B, rows, columns] by a rectangle with odd sides."""
    return max_pool2d(region.float(), kernel, 1, (kernel[0] // 2, kernel[1] // 2)).bool()


def without_specks(region: Tensor) -> Tensor:
    """Erosion of [B, rows, columns] by a 3x3 cross, then dilation by a square of about 1/16 of the shorter side (5x5 at 64x64 tokens); what lies beyond the border
    counts as edited. Coarse grids are not eroded."""
    side = min(region.shape[-2:])
    if side >= SPECK_GRID:
        region = ~(spread(~region, (3, 1)) | spread(~region, (1, 3)))
    width = 2 * max(1, round(side / 32)) + 1
    return spread(region, (width, width))


def edited_tokens(denoised: Tensor, reference: Tensor, similarity: float, mask: Tensor | None = None) -> Tensor:
    """Where a prediction differs from the reference -> bool [B, rows, columns]. denoised, reference [B, C, h, w]; mask [B, C, h, w], 0 where nothing may change.

    Where nothing differs there is no edit to go by, so every token counts as edited.
    """
    dot = token_sum(denoised * reference)
    norms = (token_sum(denoised.square()) * token_sum(reference.square())).sqrt()
    edited = without_specks(dot <= similarity * norms)
    if mask is not None:
        edited &= max_pool2d(mask.amax(dim=1), 2, ceil_mode=True) > 0
    return edited | ~edited.flatten(1).any(dim=1)[:, None, None]


def token_rows(edited: Tensor, references: int) -> Tensor:
    """Positions of the tokens to compute, int64 [B, n], in the sequence of image and reference tokens.

    An image that is edited everywhere keeps its reference tokens (their number is `references`), which makes its step exact. Shorter rows repeat their first
    entry: a token computed twice gives the same twice.
    """
    edited = edited.flatten(1)
    edited = torch.cat((edited, edited.all(dim=1, keepdim=True).expand(-1, references)), dim=1)
    counts = edited.sum(dim=1)
    order = edited.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :int(counts.max())]
    return torch.where(torch.arange(order.shape[1], device=order.device) < counts[:, None], order, order[:, :1])


def per_picture(values: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return values[:, None, None, None]


class RegionRun:
    """What one sampling run knows, for each image of the batch by itself. mask: the inpainting mask [B, C, h, w], or None."""

    def __init__(self, settings: RegionSettings, steps: int, mask: Tensor | None = None):
        self.settings = settings
        self.full = full_steps(steps, settings)
        self.mask = mask
        self.edited: Tensor | None = None
        # Noise level and results of the last computed step; change and decay of the velocity are per unit of noise level.
        self.sigma: Tensor | None = None
        self.velocity: Tensor | None = None
        self.denoised: Tensor | None = None
        self.change: Tensor | None = None
        self.decay: Tensor | None = None

    def is_full(self, step: int) -> bool:
        """Whether this step has to compute every token: by the plan, or because there is no image with a part to leave out."""
        return self.edited is None or bool(self.edited.all()) or step >= len(self.full) or self.full[step]

    def precedes_region(self, step: int) -> bool:
        """Whether this is a full step of the plan and the next one is not: what it computes is kept."""
        return step + 1 < len(self.full) and self.full[step] and not self.full[step + 1]

    def select(self, denoised: Tensor, reference: Tensor | None) -> None:
        """Choose the tokens to go on with, from predictions [B, C, h, w]. Without a reference of the same size every step stays full."""
        self.edited = None
        if reference is not None and reference.shape == denoised.shape:
            # With several GPUs the reference may have been seen on another one.
            self.edited = edited_tokens(denoised, reference.to(denoised.device), self.settings.similarity, self.mask)

    def region(self) -> Tensor:
        """The edited tokens as places of the latent, bool [B, 1, h, w]."""
        height, width = self.denoised.shape[-2:]
        if self.edited is None:
            return self.denoised.new_ones((self.denoised.shape[0], 1, height, width), dtype=torch.bool)
        return self.edited.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, None, :height, :width]

    def reusable(self, sigma: Tensor) -> Tensor:
        """Which images need no computing at this noise level, bool [B]."""
        return (self.change * (self.sigma - sigma).abs() < self.settings.reuse) & ~self.edited.flatten(1).all(dim=1)

    def predicted(self, sigma: Tensor) -> Tensor:
        """Denoised latents [B, C, h, w] at this noise level from the last computed velocity and its decay."""
        shrunk = 1 - torch.exp(self.decay * (self.sigma - sigma))
        return self.denoised + self.region() * sigma * per_picture(shrunk) * self.velocity

    def merge(self, sigma: Tensor, x: Tensor, denoised: Tensor, reused: Tensor) -> Tensor:
        """The step's result: computed in the region, kept elsewhere, and predicted for the images that are `reused` [B]."""
        merged = torch.where(self.region(), denoised, self.denoised)
        merged = torch.where(per_picture(reused), self.predicted(sigma), merged)
        self.remember(sigma, x, merged, ~reused)
        return merged

    def remember(self, sigma: Tensor, x: Tensor, denoised: Tensor, computed: Tensor | None = None) -> None:
        """Take note of the predictions for x at noise level sigma []; computed [B] says for which images (default: all)."""
        velocity = (x - denoised) / sigma
        if self.denoised is None:
            # A copy, because the caller's goes on to the sampler.
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
        # A velocity that turned round has no decay; its change is far too large for it to be used.
        self.decay = torch.where(measured, ratio.clamp(min=0.1).log() / distance, self.decay)
        self.sigma = torch.where(computed, sigma, self.sigma)
        self.velocity = torch.where(per_picture(computed), velocity, self.velocity)
        self.denoised = torch.where(per_picture(computed), denoised, self.denoised)
