"""Brings golden files of any size into shapes that the pack's code takes, without changing what is compared."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

# A packed token holds 2x2 latent pixels.
PATCH = 4
# The layers at both ends of a transformer, in the original and the diffusers layout: name -> dimension that counts packed channels.
CHANNEL_DIMENSIONS = {
    "img_in.weight": 1,
    "x_embedder.weight": 1,
    **{f"{layer}.{part}": 0 for layer in ("final_layer.linear", "proj_out") for part in ("weight", "bias")},
}


def pad_channels(tensor: Tensor, dimension: int = -1) -> Tensor:
    """Zeros behind one dimension up to the next multiple of 4. Zero channels change no norm, no product and no other channel."""
    missing = -tensor.shape[dimension] % PATCH
    return pad(tensor.movedim(dimension, -1), (0, missing)).movedim(-1, dimension) if missing else tensor


def pad_weight(name: str, weight: Tensor) -> Tensor:
    """A weight as a network with a whole number of latent channels has it."""
    return pad_channels(weight, CHANNEL_DIMENSIONS[name]).contiguous() if name in CHANNEL_DIMENSIONS else weight


def row_of_patches(tokens: Tensor) -> Tensor:
    """Packed tokens [B, L, C] -> latent [B, ceil(C/4), 2, 2L]. For what is done token by token, any arrangement serves."""
    tokens = pad_channels(tokens)
    return tokens.unflatten(2, (-1, 2, 2)).permute(0, 2, 3, 1, 4).flatten(3)


def patches_in_row(latent: Tensor, channels: int) -> Tensor:
    """The way back from `row_of_patches` -> [B, L, channels]."""
    return latent.unflatten(3, (-1, 2)).permute(0, 3, 1, 2, 4).flatten(2)[..., :channels]


def half(side: int) -> int:
    """Tokens along a side of so many latent pixels; an odd side is padded."""
    return math.ceil(side / 2)


def token_grid(ids: Tensor) -> tuple[int, int]:
    """Position ids [N, 3] of one picture's tokens -> (rows, columns)."""
    rows, columns = ((ids[:, axis].max() - ids[:, axis].min()).int().item() + 1 for axis in (1, 2))
    return rows, columns


def split_tokens(network, tokens: Tensor, ids: Tensor, target: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
    """Packed tokens [B, L, C] of a target and, behind them, a reference of any size -> (target's latent, list of reference latents, empty without one).

    ids: [L, 3] of all tokens. target: token rows and columns of the target.
    """
    tokens, count = pad_channels(tokens), target[0] * target[1]
    parts = [(tokens[:, :count], target)]
    if tokens.shape[1] > count:
        parts.append((tokens[:, count:], token_grid(ids[count:])))
    first, *others = (network.unpack(part, 2 * rows, 2 * columns) for part, (rows, columns) in parts)
    return first, others


def position_ids(network, target: Tensor, references: list[Tensor]) -> Tensor:
    """Ids of a target latent's and its references' tokens [B, L, 3]."""
    return torch.cat(
        [
            network.process_img(target)[1],
            *(network.process_reference(latent, i)[1] for i, latent in enumerate(references)),
        ],
        dim=1,
    )
