"""Scales of quantised weights: which part of a weight each scale applies to, and their product."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..rounding import divided_up

# Number of elements converted to float32 at a time.
CHUNK = 2**20


def block_sizes(config: dict) -> tuple[int, int] | None:
    """Return the rows and columns of a block according to a config.json, or None if it does not say."""
    found = [config.get("weight_block_size")]
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    sizes = next((size for size in found if isinstance(size, list)), None)
    fits = sizes is not None and len(sizes) == 2 and all(isinstance(n, int) and n > 0 for n in sizes)
    return tuple(sizes) if fits else None


def block_size(length: int, count: int, told: int | None) -> int | None:
    """Return the size of the blocks if `length` values have `count` scales, or None if that is impossible.

    told: the size from a config.json, or None. Without it, the size is a power of two, of which at most one fits, or
    else equal parts. The last block may be smaller.
    """
    if count == 1:
        return length
    sizes = [told] if told else []
    sizes += [2**power for power in range(20)]
    sizes += [length // count] if count and length % count == 0 else []
    return next((size for size in sizes if divided_up(length, size) == count), None)


def scale_grid(weight: Tensor, scale: Tensor, told: tuple[int, int] | None) -> tuple[Tensor, int, int] | None:
    """Return the scales as float32 [R, C], and how many rows and columns of the weight, viewed as [rows, rest], each
    applies to.

    Returns None for an unknown layout.

    scale: one value of any shape, [rows], [rows, 1, ...], or [R, C] for the blocks of a matrix.
    """
    rows = weight.shape[0] if weight.ndim else 1
    columns = weight.numel() // max(rows, 1)
    grid = scale.float()
    if scale.numel() == 1:
        return grid.reshape(1, 1), rows, columns
    if weight.ndim >= 2 and scale.shape[0] == rows and scale.numel() == rows:
        return grid.reshape(rows, 1), 1, columns
    if weight.ndim != 2 or scale.ndim != 2 or tuple(scale.shape) == (1, columns):
        return None
    # One row with as many scales as the weight has rows could be one scale for each row, transposed, or one for each
    # group of columns. It is read as blocks only if their size is given.
    if tuple(scale.shape) == (1, rows) and not (told and divided_up(columns, told[1]) == rows):
        return None
    row, column = (
        block_size(n, count, told[i] if told else None) for i, (n, count) in enumerate(zip(weight.shape, scale.shape))
    )
    return (grid, row, column) if row and column else None


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows with about CHUNK elements each."""
    step = max(1, CHUNK // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def multiplied(weight: Tensor, grid: Tensor, row: int, column: int) -> Tensor:
    """Multiply a weight, viewed as [rows, rest], by its scales in float32; returns bfloat16 in the weight's shape.

    grid: float32 [R, C], one scale for `row` rows and `column` columns.
    """
    flat = weight.reshape(weight.shape[0] if weight.ndim else 1, -1)
    grid = grid.to(weight.device)
    out = torch.empty(flat.shape, dtype=torch.bfloat16, device=weight.device)
    for part in row_chunks(*flat.shape):
        scales = grid[torch.arange(part.start, part.stop, device=weight.device) // row]
        if grid.shape[1] > 1:
            scales = scales.repeat_interleave(column, dim=1)[:, : flat.shape[1]]
        out[part] = flat[part].float() * scales
    return out.reshape(weight.shape)
