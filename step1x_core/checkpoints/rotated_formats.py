"""A matrix in the host's ConvRot formats: groups of its columns are rotated by a Hadamard matrix, which spreads outliers
of weights and inputs over the group, then rounded to 8 or 4 bits. The host rotates the inputs in the same way.
"""

import functools

import torch
from torch import Tensor

from .plain_formats import FP8, INT8_MAX, chunks

# The largest group of columns that is rotated together; the sizes are powers of 4.
LARGEST_GROUP = 256
INT4_MAX = 7.0
# Parts of a row's largest value that are tried as the largest 4-bit value; the one with the least error is taken.
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)
# Columns of a row that share a scale in w4a8.
CODE_GROUP = 16
# The 16 values of w4a8 in units of a group's scale: comfy-kitchen's table for normally distributed weights.
CODES = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)  # fmt: skip
# Times that the scale of a group is fitted to its codes and the codes to it.
FITS = 2


def group_size(columns: int) -> int:
    """Return how many of a matrix's columns are rotated together: the largest power of 4 that divides them, at most
    LARGEST_GROUP."""
    size = LARGEST_GROUP
    while columns % size:
        size //= 4
    return size


@functools.cache
def hadamard(size: int) -> Tensor:
    """Return the host's regular Hadamard matrix as float32 [size, size]; symmetric and orthogonal. size: a power of
    4."""
    four = 1.0 - 2.0 * torch.eye(4).flip(1)
    out = torch.ones(1, 1)
    while out.shape[0] < size:
        out = torch.kron(out, four)
    return out / size**0.5


def rotated(x: Tensor) -> Tensor:
    """Rotate the last axis of x in groups, as float32; its own inverse."""
    size = group_size(x.shape[-1])
    return (x.float().unflatten(-1, (-1, size)) @ hadamard(size).to(x.device)).flatten(-2)


def packed(codes: Tensor) -> Tensor:
    """Pack 4-bit integers [N, K] into int8 [N, K / 2]; the even columns are the low halves."""
    codes = codes.to(torch.int32) & 15
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.int8)


def quantise_int8_rotated(weight: Tensor) -> dict[str, Tensor]:
    """Quantise [N, K] to "weight" int8 [N, K] and "weight_scale" float32 [N, 1]."""
    data = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty((weight.shape[0], 1), device=weight.device)
    for rows in chunks(weight):
        values = rotated(weight[rows])
        scale[rows] = (values.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        data[rows] = (values / scale[rows]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return {"weight": data, "weight_scale": scale}


def quantise_int4_rotated(weight: Tensor) -> dict[str, Tensor]:
    """Quantise [N, K] to "weight" int8 [N, K / 2], two values in each, and "weight_scale" float32 [N]."""
    rows, columns = weight.shape
    data = torch.empty((rows, columns // 2), dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, device=weight.device)
    for part in chunks(weight):
        values = rotated(weight[part])
        peak = values.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        scales = torch.stack([peak * (clip / INT4_MAX) for clip in CLIPS])
        losses = torch.stack([(rounded_int4(values, one) * one - values).square().sum(1, keepdim=True) for one in scales])
        best = scales.gather(0, losses.argmin(dim=0, keepdim=True))[0]
        data[part], scale[part] = packed(rounded_int4(values, best)), best[:, 0]
    return {"weight": data, "weight_scale": scale}


def rounded_int4(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).round().clamp(-INT4_MAX, INT4_MAX)


def quantise_w4a8(weight: Tensor) -> dict[str, Tensor]:
    """Quantise [N, K] to 4-bit codes, "weight" int8 [N, K / 2], for one of 16 values, "weight_codebook" float32 [16],
    times a scale of the group, "weight_s_rel" e4m3 [N, K / 16], rounded to whole numbers of the row's scale,
    "weight_s_channel" float32 [N]."""
    rows, columns = weight.shape
    table = torch.tensor(CODES, device=weight.device)
    data = torch.empty((rows, columns // 2), dtype=torch.int8, device=weight.device)
    relative = torch.empty((rows, columns // CODE_GROUP), dtype=FP8, device=weight.device)
    channel = torch.empty(rows, device=weight.device)
    for part in chunks(weight):
        values = rotated(weight[part]).unflatten(1, (-1, CODE_GROUP))
        scale = fitted_scales(values, table)
        row = (scale.amax(dim=1, keepdim=True) * (table.abs().amax() / INT8_MAX)).clamp(min=1e-8)
        relative[part] = (scale / row)[..., 0].to(FP8)
        # The whole numbers that the host multiplies, and the nearest of them.
        levels = (table * relative[part].float()[..., None]).round().clamp(-INT8_MAX, INT8_MAX)
        codes = torch.searchsorted((levels[..., 1:] + levels[..., :-1]) / 2, values / row)
        data[part], channel[part] = packed(codes.flatten(1)), row[:, 0, 0]
    return {"weight": data, "weight_s_rel": relative, "weight_s_channel": channel, "weight_codebook": table}


def fitted_scales(values: Tensor, table: Tensor) -> Tensor:
    """Return a scale [N, G, 1] for each group of values [N, G, C] that brings them near to the values of the table."""
    middles = (table[1:] + table[:-1]) / 2
    scale = values.abs().amax(dim=2, keepdim=True).clamp(min=1e-8)
    for _ in range(FITS):
        near = table[torch.bucketize(values / scale, middles)]
        scale = ((values * near).sum(2, keepdim=True) / near.square().sum(2, keepdim=True)).clamp(min=1e-8)
    return scale
