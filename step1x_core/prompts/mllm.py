"""Inputs and outputs of the language model: positions, mask and output layout (docs/architecture.md)."""

from collections.abc import Iterable

import torch
from torch import Tensor


def attention_mask(ids: Tensor) -> Tensor:
    """Return the official mask, `id > 0`. Id 0 is a lone exclamation mark, which the model therefore never sees."""
    return (ids > 0).long()


def mrope_positions(mask: Tensor, image_start: int, grid: tuple[int, int]) -> Tensor:
    """Return the rope positions [3, L] (time, row, column) of a sequence with one image.

    mask: [L] of 0/1; masked tokens get position 1 on every axis and do not advance the count.
    image_start: index of the first image token. grid: image tokens (rows, columns).
    """
    rows, columns = grid
    image_end = image_start + rows * columns
    positions = torch.ones((3, mask.shape[0]), dtype=torch.long, device=mask.device)

    def text(span, start):
        positions[:, span] = torch.where(mask[span].bool(), mask[span].cumsum(0) - 1 + start, 1)

    first = int(mask[:image_start].sum())
    text(slice(0, image_start), 0)
    cells = torch.arange(rows * columns, device=mask.device)
    positions[0, image_start:image_end] = first
    positions[1, image_start:image_end] = first + cells // columns
    positions[2, image_start:image_end] = first + cells % columns
    text(slice(image_end, mask.shape[0]), first + max(rows, columns))
    return positions


def rope_positions(runs: Iterable[int | tuple[int, int]]) -> Tensor:
    """Return the rope positions [3, L] (time, row, column) of a sequence without masked tokens, as used for generation.

    runs: the sequence in order, as numbers of text tokens and (rows, columns) of images.
    """
    parts, start = [], 0
    for run in runs:
        if isinstance(run, int):
            parts.append((start + torch.arange(run)).expand(3, -1))
            start += run
        else:
            rows, columns = run
            cells = torch.arange(rows * columns)
            parts.append(start + torch.stack((torch.zeros_like(cells), cells // columns, cells % columns)))
            start += max(rows, columns)
    return torch.cat(parts, dim=1)
