"""What one step of writing text computes, on Triton kernels (triton_kernels.py, imported at the first call).

Tensors are bf16 and contiguous, x is [N, C]: one token of each of a few rows. Each result of a row is the same whatever
the number of rows. The caller makes the GPU of its tensors current.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..rounding import divided_up, next_power_of_2

FP8 = torch.float8_e4m3fn
# Rows of a tile. Tensor cores take no fewer; rows that do not exist cost nothing, since reading the weights takes the
# time.
ROWS = 16
# Tokens that one program of the attention reads, and how many of its results are added up at a time.
CHUNK, JOINED = 64, 16


@dataclass(frozen=True)
class Tile:
    """How a product is cut up: outputs and inputs of a tile, warps, tiles on their way from memory, and parts of the
    inputs, whose results are added up by whoever reads them."""

    outputs: int
    inputs: int
    warps: int
    stages: int
    splits: int = 1


# The tiles of a product by bytes of a weight, the best of some 40 on an H100 (docs/performance_notes.md). Its 132
# multiprocessors have room for some of these programs each, and a layer with 3584 outputs has 112 tiles of 32: only in
# parts it keeps them all busy.
QKV = {2: Tile(32, 128, 4, 4, 2), 1: Tile(32, 128, 4, 4, 4)}
OUT = {2: Tile(32, 128, 4, 4, 3), 1: Tile(32, 128, 2, 5, 4)}
DOWN = {2: Tile(32, 128, 4, 4, 3), 1: Tile(32, 128, 2, 5, 4)}
HEAD = {2: Tile(16, 256, 4, 4), 1: Tile(32, 256, 4, 4)}
GATE = {2: Tile(32, 128, 4, 4), 1: Tile(32, 256, 4, 4)}


@dataclass(frozen=True)
class Projection:
    """A linear layer as it lies in memory: weight [out, in] in bf16 or e4m3, scale float32 [] for e4m3, bias [out]."""

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    def fits(self) -> bool:
        """Whether the kernels take its shape."""
        return self.weight.is_contiguous() and self.weight.shape[1] % 64 == 0


def inputs_of(tile: Tile, columns: int) -> int:
    """Return the largest number of inputs up to the tile's that divides the columns, which are a multiple of 64."""
    size = tile.inputs
    while columns % size:
        size //= 2
    return size


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that the tiles of one program may take on a device: 227 KiB on an H100, 99 on an RTX 40."""
    if device.type != "cuda":  # Triton's interpreter
        return 2**30
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024)


def fitting(tile: Tile, weight: Tensor, weights: int = 1) -> Tile:
    """Return the tile with as many stages as there is memory for; results do not depend on it. weights: number of them
    that a program reads."""
    stage = inputs_of(tile, weight.shape[1]) * (weights * tile.outputs * weight.element_size() + 2 * ROWS)
    # Some is left for what else the compiler puts there.
    return replace(tile, stages=max(1, min(tile.stages, (shared_memory(weight.device) - 2048) // stage)))


def given(tensors: list[Tensor | None]) -> list[Tensor | int]:
    """Return the tensors, or zeros in their place, which a kernel does not read, where there are none."""
    return [0 if tensor is None else tensor for tensor in tensors]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x [N, C] with weight [C]."""
    from .triton_kernels import norm_kernel

    out = torch.empty_like(x)
    rows, columns = x.shape
    norm_kernel[(rows,)](x, weight, out, columns, eps, BLOCK=next_power_of_2(columns), num_warps=8)
    return out


def add_norm(x: Tensor, parts: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add the results of a product [splits, N, C] to x [N, C]; returns the sum and its RMS norm with weight [C]."""
    from .triton_kernels import add_norm_kernel

    out, normed = torch.empty_like(x), torch.empty_like(x)
    rows, columns = x.shape
    add_norm_kernel[(rows,)](x, parts, weight, out, normed, rows, columns, eps, SPLITS=len(parts),
                             BLOCK=next_power_of_2(columns), num_warps=8)
    return out, normed


def project(x: Tensor, parts: list[Projection], tile: Tile, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiply x by one to three weights of the same dtype; returns their results side by side, [splits, N, sum of
    outs], to be added up."""
    from .triton_kernels import project_kernel

    rows, columns = x.shape
    counts = [part.weight.shape[0] for part in parts] + [0] * (3 - len(parts))
    all_parts = [*parts, *[parts[0]] * (3 - len(parts))]
    tile, inputs = fitting(tile, parts[0].weight), inputs_of(tile, columns)
    # No part without inputs.
    splits = divided_up(columns // inputs, divided_up(columns // inputs, tile.splits))
    out = x.new_empty(splits, rows, sum(counts), dtype=dtype)
    grid = (sum(divided_up(count, tile.outputs) for count in counts), divided_up(rows, ROWS), splits)
    project_kernel[grid](
        x, *(part.weight for part in all_parts), *given([part.scale for part in all_parts]),
        *given([part.bias for part in all_parts]), out, rows, *counts, COLUMNS=columns,
        SCALED=parts[0].scale is not None, BIASED=parts[0].bias is not None, SPLITS=splits, ROWS=ROWS,
        BLOCK_N=tile.outputs, BLOCK_K=inputs, num_warps=tile.warps, num_stages=tile.stages,
    )
    return out


def gate(x: Tensor, gate: Projection, up: Projection, tile: Tile) -> Tensor:
    """Return silu(x @ gate^T) * (x @ up^T), [N, out]."""
    from .triton_kernels import gate_kernel

    rows, columns = x.shape
    outputs, tile = gate.weight.shape[0], fitting(tile, gate.weight, 2)
    out = x.new_empty(rows, outputs)
    gate_kernel[(divided_up(outputs, tile.outputs), divided_up(rows, ROWS))](
        x, gate.weight, up.weight, gate.scale, up.scale, out, rows, outputs, COLUMNS=columns,
        SCALED=gate.scale is not None, ROWS=ROWS, BLOCK_N=tile.outputs, BLOCK_K=inputs_of(tile, columns),
        num_warps=tile.warps, num_stages=tile.stages,
    )
    return out


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, heads: int) -> Tensor:
    """Add up queries, keys and values [splits, N, (heads + 2 * kv_heads) * D] and rotate queries and keys by cos and
    sin, float32 [N, D / 2].

    Writes keys and values to place lengths[row] of the cache [N, kv_heads, capacity, D]; returns queries
    [N, heads, D].
    """
    from .triton_kernels import rotate_kernel

    rows, kv_heads, _, width = keys.shape
    q = keys.new_empty(rows, heads, width)
    rotate_kernel[(rows, heads + 2 * kv_heads)](
        qkv, cos, sin, lengths, q, keys, values, rows, keys.stride(0), keys.stride(2), keys.stride(1), SPLITS=len(qkv),
        HEADS=heads, KV_HEADS=kv_heads, HALF=width // 2, num_warps=1,
    )
    return q


def attend(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Attention of queries [N, heads, D] over places 0..lengths[row] of the cache; returns [N, heads * D]."""
    from .triton_kernels import attend_kernel, join_kernel

    rows, kv_heads, capacity, width = keys.shape
    heads, splits = q.shape[1], divided_up(capacity, CHUNK)
    parts = q.new_empty(rows, heads, splits, width, dtype=torch.float32)
    tops, totals = (q.new_empty(rows, heads, splits, dtype=torch.float32) for _ in range(2))
    attend_kernel[(rows, kv_heads, splits)](
        q, keys, values, lengths, parts, tops, totals, width**-0.5, splits, keys.stride(0), keys.stride(2),
        keys.stride(1), HEADS=heads, KV_HEADS=kv_heads, WIDTH=width, ROWS=max(ROWS, heads // kv_heads), CHUNK=CHUNK,
    )
    out = q.new_empty(rows, heads * width)
    join_kernel[(rows, heads)](parts, tops, totals, lengths, out, splits, HEADS=heads, WIDTH=width, CHUNK=CHUNK,
                               BLOCK=JOINED, num_warps=4)
    return out
