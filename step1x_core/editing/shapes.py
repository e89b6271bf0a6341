"""Shapes in boolean masks [h, w]: growing, shrinking, connected parts, holes. Plain torch, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grown(mask: Tensor, radius: int) -> Tensor:
    """Add to a mask [h, w] every pixel at most `radius` away from it, counted as a king moves."""
    if radius <= 0:
        return mask
    # Rows, then columns: a square costs 2 * side comparisons, not side**2.
    values = mask[None, None].float()
    values = F.max_pool2d(values, (2 * radius + 1, 1), 1, (radius, 0))
    return F.max_pool2d(values, (1, 2 * radius + 1), 1, (0, radius))[0, 0] > 0


def shrunk(mask: Tensor, radius: int) -> Tensor:
    """Remove from a mask [h, w] every pixel at most `radius` away from its outside. The image's border is no edge."""
    return ~grown(~mask, radius)


def parts(mask: Tensor) -> tuple[Tensor, int]:
    """Number the connected parts of a mask [h, w], diagonals included -> (int64 [h, w]: 0 outside, else 1..n; n).

    Each pixel starts as its own part, named by its index. Every round joins a part with the highest name that touches
    it and follows names to their ends, so that the rounds grow with the logarithm of a part's length, not with the
    length.
    """
    height, width = mask.shape
    inside = mask.flatten()
    names = torch.arange(height * width, device=mask.device)
    labels = torch.where(inside, names, -1)
    while True:
        # Doubles hold every index exactly.
        near = F.max_pool2d(labels.view(1, 1, height, width).double(), 3, 1, 1).flatten().long()
        target = names.scatter_reduce(0, labels[inside], near[inside], "amax")
        while True:
            further = target[target]
            if torch.equal(further, target):
                break
            target = further
        joined = torch.where(inside, target[labels.clamp(min=0)], -1)
        if torch.equal(joined, labels):
            break
        labels = joined
    kept, numbers = labels[inside].unique(return_inverse=True)
    out = torch.zeros_like(labels)
    out[inside] = numbers + 1
    return out.view(height, width), len(kept)


def sums(labels: Tensor, count: int, values: Tensor) -> Tensor:
    """Sum values [h, w] over each of the parts that `parts` numbered -> [count + 1]; entry 0 is the outside."""
    out = torch.zeros(count + 1, device=labels.device)
    return out.scatter_add_(0, labels.flatten(), values.flatten().float())


def without_specks(mask: Tensor, certain: Tensor, least: float, reach: int = 0) -> Tensor:
    """Keep the connected parts of a mask [h, w] that hold at least `least` pixels of `certain` [h, w]. Parts that would
    touch if each grew by `reach` pixels count together, as the letters of a word do."""
    labels, count = parts(grown(mask, reach))
    return (sums(labels, count, certain) >= least)[labels] & mask


def without_holes(mask: Tensor, largest: float) -> Tensor:
    """Fill the holes of a mask [h, w]: parts of its outside of at most `largest` pixels that do not touch the border."""
    labels, count = parts(~mask)
    fill = sums(labels, count, ~mask) <= largest
    fill[torch.cat([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = False
    return mask | fill[labels] & (labels > 0)


def ramp(mask: Tensor, width: int) -> Tensor:
    """Give a mask [h, w] a soft edge that lies inside it -> float32 [h, w]: 0 outside, and rising to 1 over `width`
    pixels. The image's border is no edge."""
    steps = [mask.float()]
    for _ in range(width):
        steps.append(shrunk(steps[-1] > 0, 1).float())
    return torch.stack(steps).mean(0)
