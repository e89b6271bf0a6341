"""Position ids of the text tokens of v1.2 (docs/model.md, v1.2 positions)."""

import torch
from torch import Tensor

from ..images import SIZE_MULTIPLE, VISION_CELL
from ..prompts.cut import KEPT


def vision_coordinates(cells: int, side: int) -> Tensor:
    """Return where `cells` vision tokens lie along one axis of the latent token grid of an image `side` pixels long,
    float64 [cells].

    The centre of a vision token is mapped from the language model's image to the working image, then to latent tokens,
    whose centre the official code puts at pixel 11 instead of 7.5.
    """
    centres = VISION_CELL * torch.arange(cells, dtype=torch.float64) + (VISION_CELL - 1) / 2
    pixels = centres * (side - 1) / (VISION_CELL * cells - 1)
    return (pixels - 11) / SIZE_MULTIPLE


def text_ids(positions: Tensor, image_start: int, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Convert the language-model positions of a sequence to (time, row, column) of the kept tokens, float32 [L, 3].

    positions: [3, L], see `mllm.mrope_positions`. image_start: index of the first image token.
    grid: image tokens (rows, columns). size: working size (width, height) of the image.

    Time counts down from -1, the largest among the kept tokens. Rows and columns are fractional on image tokens and 0
    elsewhere.
    """
    rows, columns = grid
    image = slice(image_start, image_start + rows * columns)
    ids = torch.zeros(positions.shape[1], 3)
    ids[image, 1] = vision_coordinates(rows, size[1]).repeat_interleave(columns).float()
    ids[image, 2] = vision_coordinates(columns, size[0]).repeat(rows).float()
    time = positions[0, KEPT].cpu()
    ids = ids[KEPT]
    ids[:, 0] = time - (time.max() + 1)
    return ids
