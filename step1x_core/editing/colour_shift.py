"""The colour shift of a whole image: what an edit made lighter, darker or warmer everywhere, told from what it changed
in one place."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The shift is told on about this many cells per side: noise averages out, and an edge moved by a pixel does not count.
CELLS = 48
ROUNDS = 8
# A cell agrees with the shift if it is within this many median deviations of it, and within the second number (0..1)
# in any case; the third bounds both.
DEVIATIONS, SURELY, AT_MOST = 3.0, 0.006, 0.03
# Least spread (standard deviation) of a channel from which a gain can be told from an offset.
SPREAD = 0.02
GAINS = (0.5, 2.0)


@dataclass(frozen=True)
class Shift:
    """`after = gain * before + offset` for each channel [3]. agree: share of the image that the shift explains. size: the
    change (0..1) that hardly any part of the image exceeds, in the channel that changes most."""

    gain: Tensor
    offset: Tensor
    agree: float
    size: float

    def undone(self, image: Tensor) -> Tensor:
        """Take the shift back from an image [..., 3]."""
        return (image - self.offset) / self.gain


def no_shift(device=None) -> Shift:
    return Shift(torch.ones(3, device=device), torch.zeros(3, device=device), 0.0, 0.0)


def cells(image: Tensor) -> Tensor:
    """Means over square cells of an image [h, w, 3] -> [n, 3]."""
    side = max(1, min(image.shape[:2]) // CELLS)
    return F.avg_pool2d(image.movedim(-1, 0)[None], side)[0].flatten(1).T


def fitted(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares gain and offset of each channel for cells [n, 3]; where a channel is flat, the gain is 1."""
    middle, goal = before.mean(0), after.mean(0)
    spread = ((before - middle) ** 2).mean(0)
    gain = ((before - middle) * (after - goal)).mean(0) / spread.clamp(min=1e-8)
    gain = torch.where(spread > SPREAD**2, gain.clamp(*GAINS), torch.ones_like(gain))
    return gain, goal - gain * middle


def colour_shift(before: Tensor, after: Tensor) -> Shift:
    """Find the shift that most of an image has in common, whatever the rest of it did. Images [h, w, 3] in 0..1.

    It begins with the median difference and fits gain and offset to the cells that agree, again and again.
    """
    old, new = cells(before), cells(after)
    gain, offset = torch.ones_like(old[0]), (new - old).median(0).values
    for _ in range(ROUNDS):
        error = (gain * old + offset - new).abs().amax(1)
        agrees = error <= (DEVIATIONS * error.median()).clamp(SURELY, AT_MOST)
        if int(agrees.sum()) < 8:
            break
        gain, offset = fitted(old[agrees], new[agrees])
    error = (gain * old + offset - new).abs().amax(1)
    agrees = error <= (DEVIATIONS * error.median()).clamp(SURELY, AT_MOST)
    size = (gain * old + offset - old).abs().quantile(0.95, dim=0).max()
    return Shift(gain, offset, float(agrees.float().mean()), float(size))
