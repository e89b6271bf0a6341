"""A matrix in the host's quantised formats that leave its columns as they are: fp8, int8, mxfp8, nvfp4."""

from collections.abc import Iterator

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_MAX = 127.0
# The values of a 4-bit float are 0, 0.5, 1, 1.5, 2, 3, 4, 6; these are the midpoints between neighbours.
FP4_MAX = 6.0
FP4_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
FP4_BLOCK = 16
# Values that share a scale in mxfp8, and what is added to the exponent of that scale to store it as uint8.
MXFP8_BLOCK = 32
E8M0_BIAS = 127

# Number of elements converted to float32 at a time.
CHUNK = 2**20


def chunks(weight: Tensor) -> Iterator[slice]:
    """Yield slices of rows with about CHUNK elements each; all rows of a tensor on the meta device, which has none."""
    rows = weight.shape[0] if weight.is_meta else max(1, CHUNK // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))


def largest(weight: Tensor) -> Tensor:
    """Return the largest magnitude of [N, K] as float32 [], at least the smallest normal float."""
    peak = torch.stack([weight[rows].float().abs().amax() for rows in chunks(weight)]).amax()
    return peak.clamp(min=torch.finfo(torch.float32).tiny)


def power_of_two(scale: Tensor) -> Tensor:
    """Round a scale up to a power of two. The host then multiplies without rounding, even in float16, and a
    floating-point format loses no precision."""
    return torch.exp2(torch.ceil(torch.log2(scale)))


def quantise_fp8(weight: Tensor) -> dict[str, Tensor]:
    """Quantise [N, K] to "weight" e4m3 [N, K] and "weight_scale" float32 []. An e4m3 weight is kept unchanged."""
    if weight.dtype == FP8:
        return {"weight": weight, "weight_scale": torch.ones((), device=weight.device)}
    scale = power_of_two(largest(weight) / FP8_MAX)
    data = torch.empty_like(weight, dtype=FP8)
    for rows in chunks(weight):
        data[rows] = (weight[rows].float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return {"weight": data, "weight_scale": scale}


def quantise_int8(weight: Tensor) -> dict[str, Tensor]:
    """Quantise [N, K] to "weight" int8 [N, K] and "weight_scale" float32 [N, 1]."""
    data = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty((weight.shape[0], 1), device=weight.device)
    for rows in chunks(weight):
        values = weight[rows].float()
        scale[rows] = (values.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        data[rows] = (values / scale[rows]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return {"weight": data, "weight_scale": scale}


def quantise_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    """Quantise [N, K] to "weight" uint8 [N, K/2], "weight_scale" e4m3 and "weight_scale_2" float32 [].

    A byte of the weight holds two values. "weight_scale" has one scale for 16 values of a row, stored in tiles.
    """
    scale = power_of_two(largest(weight) / (FP8_MAX * FP4_MAX))
    rows, columns = weight.shape
    data = torch.empty((rows, columns // 2), dtype=torch.uint8, device=weight.device)
    blocks = torch.empty((rows, columns // FP4_BLOCK), dtype=FP8, device=weight.device)
    midpoints = torch.tensor(FP4_MIDPOINTS, device=weight.device)
    for part in chunks(weight):
        values = weight[part].float().unflatten(1, (-1, FP4_BLOCK))
        blocks[part] = (values.abs().amax(dim=2) / FP4_MAX / scale).clamp(max=FP8_MAX).to(FP8)
        # A block of zeros has the scale 0.
        values = (values / (blocks[part].float() * scale)[..., None]).nan_to_num(0.0, 0.0, 0.0).flatten(1)
        codes = torch.bucketize(values.abs(), midpoints, out_int32=True) + 8 * values.signbit().int()
        data[part] = (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8)
    return {"weight": data, "weight_scale": tiled(blocks), "weight_scale_2": scale}


def quantise_mxfp8(weight: Tensor) -> dict[str, Tensor]:
    """Quantise [N, K] to "weight" e4m3 [N, K] and "weight_scale" uint8: exponents of the scales of 32 values of a row,
    stored in tiles."""
    rows, columns = weight.shape
    data = torch.empty_like(weight, dtype=FP8)
    exponents = torch.empty((rows, columns // MXFP8_BLOCK), dtype=torch.uint8, device=weight.device)
    for part in chunks(weight):
        values = weight[part].float().unflatten(1, (-1, MXFP8_BLOCK))
        peak = values.abs().amax(dim=2).clamp(min=torch.finfo(torch.float32).tiny)
        power = torch.ceil(torch.log2(peak / FP8_MAX)).clamp(-E8M0_BIAS, E8M0_BIAS)
        exponents[part] = (power + E8M0_BIAS).to(torch.uint8)
        scaled = (values / torch.exp2(power)[..., None]).clamp(-FP8_MAX, FP8_MAX)
        data[part] = scaled.flatten(1).to(FP8)
    return {"weight": data, "weight_scale": tiled(exponents)}


def tiled(scales: Tensor) -> Tensor:
    """Reorder block scales [N, C] for tensor cores: tiles of 128 rows and 4 columns, zero-padded to whole tiles."""
    rows, columns = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = padded.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32)).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).view(scales.dtype)
