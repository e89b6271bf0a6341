"""Resizes of 8-bit images on any device of torch, bit for bit as Pillow and torch compute them on the CPU.

Both weight the pixels of a row with integers and round to 8 bits, then do the same with the columns.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

# Bits behind the point of a weight of Pillow's; torch takes as many as fit in 16 bits with the largest weight.
PILLOW_BITS = 22


def cubic(x: np.ndarray) -> np.ndarray:
    """Pillow's and, up to a rounding that 15 bits do not show, torch's cubic filter."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    return np.where(x < 1, near, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0))


def lanczos(x: np.ndarray) -> np.ndarray:
    """Pillow's filter of that name. Its sines are those of the C library, as Python's are and numpy's may not be."""
    def sinc(values: np.ndarray) -> np.ndarray:
        angles = (values * math.pi).tolist()
        return np.array([math.sin(angle) / angle if angle else 1.0 for angle in angles])

    out = np.zeros(x.shape)
    inside = (x >= -3) & (x < 3)
    out[inside] = sinc(x[inside]) * sinc(x[inside] / 3)
    return out


# Each filter with the number of pixels to each side that it covers.
FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {"bicubic": (cubic, 2.0),
                                                                        "lanczos": (lanczos, 3.0)}


@functools.lru_cache(64)
def weights(before: int, after: int, kind: str, pillow: bool) -> tuple[Tensor, Tensor, int]:
    """Return which of `before` pixels make each of `after`, int64 [taps, after], their weights, int32 [taps, after],
    and the bits behind the weights' point."""
    function, support = FILTERS[kind]
    scale = before / after
    wide = max(scale, 1.0)
    support *= wide
    centre = (np.arange(after) + 0.5) * scale
    first = np.maximum(np.trunc(centre - support + 0.5), 0)
    count = np.minimum(np.trunc(centre + support + 0.5), before) - first
    taps = np.arange(math.ceil(support) * 2 + 1)[:, None]
    # Both multiply by the inverse, which rounds otherwise than a division.
    found = np.where(taps < count, function((taps + first - centre + 0.5) * (1.0 / wide)), 0.0)
    found /= functools.reduce(np.add, found)  # summed in order, as both do
    bits = PILLOW_BITS
    if not pillow:
        bits = next(bits for bits in range(PILLOW_BITS + 1)
                    if bits == PILLOW_BITS or int(0.5 + found.max() * 2 ** (bits + 1)) >= 2**15)
    rounded = np.trunc(found * 2**bits + np.where(found < 0, -0.5, 0.5)).astype(np.int32)
    places = np.minimum(first + taps, before - 1).astype(np.int64)
    return torch.from_numpy(places), torch.from_numpy(rounded), bits


def resize_rows(pixels: Tensor, after: int, kind: str, pillow: bool) -> Tensor:
    """Resize the first axis of uint8 [n, ...] to `after`."""
    if pixels.shape[0] == after:
        return pixels
    places, factors, bits = weights(pixels.shape[0], after, kind, pillow)
    places, factors = places.to(pixels.device), factors.to(pixels.device)[:, :, None]
    flat = pixels.flatten(1).int()
    sums = torch.full((after, flat.shape[1]), 1 << (bits - 1), dtype=torch.int32, device=pixels.device)
    for place, factor in zip(places, factors):
        sums.addcmul_(flat.index_select(0, place), factor)
    return (sums >> bits).clamp_(0, 255).to(torch.uint8).view(after, *pixels.shape[1:])


def resize_columns(pixels: Tensor, after: int, kind: str, pillow: bool) -> Tensor:
    """Resize the second axis of uint8 [n, m, ...] to `after`."""
    return resize_rows(pixels.transpose(0, 1), after, kind, pillow).transpose(0, 1)


def never(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Pillow up to 12, and torch: the rows of pixels come first."""
    return False


def where_it_saves(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Pillow 13 resizes the columns first if that takes away much more than the rows do."""
    (width, height), (new_width, new_height) = before, after
    return new_height < height and height - new_height > 2 * (width - new_width)


def resize_in_order(pixels: Tensor, size: tuple[int, int], kind: str, pillow: bool, columns_first) -> Tensor:
    """Resize uint8 [H, W, C] to size (width, height). columns_first: function of both sizes, since each pass rounds."""
    width, height = size
    if columns_first((pixels.shape[1], pixels.shape[0]), size):
        return resize_columns(resize_rows(pixels, height, kind, pillow), width, kind, pillow)
    return resize_rows(resize_columns(pixels, width, kind, pillow), height, kind, pillow)


def by_library(pixels: Tensor, size: tuple[int, int], kind: str, pillow: bool) -> Tensor:
    """What the library itself computes, for uint8 [H, W, C] on the CPU."""
    if pillow:
        picture = Image.fromarray(pixels.numpy())
        return torch.from_numpy(np.array(picture.resize(size, Image.Resampling[kind.upper()])))
    batch = pixels.movedim(-1, 0)[None]
    return interpolate(batch, size[::-1], mode=kind, antialias=True)[0].movedim(0, -1)


@functools.cache
def order_of(pillow: bool, device: torch.device) -> Callable | None:
    """Return in which order this version of Pillow, or of torch, resizes, or None if it computes something else or this
    device does. Found out once, on small images of noise."""
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (29, 31, 3), dtype=np.uint8))
    sizes = [(40, 9), (40, 28), (9, 40), (30, 28), (29, 24), (30, 26), (12, 7), (7, 3), (64, 50), (31, 11)]
    kinds = FILTERS if pillow else ["bicubic"]
    try:
        for order in (never, where_it_saves):
            if all(torch.equal(resize_in_order(noise.to(device), size, kind, pillow, order).cpu(),
                               by_library(noise, size, kind, pillow)) for size in sizes for kind in kinds):
                return order
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:  # a device without one of the operations on integers
        pass
    return None


def resize_exactly(pixels: Tensor, size: tuple[int, int], kind: str, pillow: bool = True) -> Tensor:
    """Resize uint8 [H, W, C] to size (width, height) on its device, contiguous.

    kind: a key of FILTERS. pillow: compute what `PIL.Image.resize` does; False for what torch's `interpolate` with
    antialias does, bicubic. A library whose results are others than those known here computes them itself.
    """
    order = order_of(pillow, pixels.device)
    if order is None:
        return by_library(pixels.cpu(), size, kind, pillow).to(pixels.device)
    return resize_in_order(pixels, size, kind, pillow, order).contiguous()
