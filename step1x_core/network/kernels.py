"""Triton kernels for the operations between the matrix products of a FLUX block; each reads its input once and writes
its result once.

A result can be written as e4m3 for a product on fp8 tensor cores: value / scale, clamped to magnitudes up to 448. The
kernels themselves are in triton_kernels.py, which is imported at the first call, because Triton is not published for
every system.
Arithmetic is float32. Where the plain path stores a value in the model's dtype before the rotary positions, the kernels
do, too.
"""

import functools

import torch
from torch import Tensor

from ..rounding import divided_up, next_power_of_2

FP8 = torch.float8_e4m3fn
# Work per program; the fastest on an H200 (docs/performance.md).
COLUMNS = 4096
HEADS = 32


def on_its_card(function):
    """Make the GPU of the first argument (a tensor or a list of tensors) current. Triton launches kernels on the
    current GPU, wherever its tensors are."""

    @functools.wraps(function)
    def launched(first, *args, **kwargs):
        with torch.cuda.device_of(first[0] if isinstance(first, list) else first):
            return function(first, *args, **kwargs)

    return launched


@on_its_card
def modulate(x: Tensor, shift: Tensor, scale: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """Apply a layer norm without weights (eps 1e-6) to x [B, S, C], multiply by 1 + scale and add shift ([B, 1, C]
    each).

    Returns [B, S, C] in x's dtype, or in e4m3 if out_scale [] is given.
    """
    from .triton_kernels import modulate_kernel

    batch, tokens, columns = x.shape
    x = x.contiguous()
    out = torch.empty_like(x, dtype=x.dtype if out_scale is None else FP8)
    modulate_kernel[(batch * tokens,)](
        x,
        shift,
        scale,
        out,
        out_scale,
        tokens,
        columns,
        shift.stride(0),
        scale.stride(0),
        1e-6,
        BLOCK=next_power_of_2(columns),
        FP8_OUT=out_scale is not None,
        num_warps=8,
    )
    return out


@on_its_card
def fp8_scale(parts: list[Tensor]) -> Tensor:
    """Return the smallest power of two, float32 [], with which e4m3 holds the largest magnitude of all parts [B, S, C];
    at least 2**-60.

    The rows of the parts may be strided. A power of two rounds only what falls below the range of e4m3.
    """
    from .triton_kernels import fp8_scale_kernel

    out = torch.full((), 2.0**-60, device=parts[0].device)
    for x in parts:
        batch, tokens, columns = x.shape
        fp8_scale_kernel[(batch * tokens,)](
            x, out, tokens, columns, x.stride(0), x.stride(1), BLOCK=next_power_of_2(columns)
        )
    return out


@on_its_card
def copy_rows(
    x: Tensor, out: Tensor, x_scale: Tensor | None = None, out_scale: Tensor | None = None, gelu: bool = False
) -> None:
    """Write x [B, S, C] to out [B * S, C], times x_scale [] and through GELU (tanh) if requested; e4m3 if out_scale []
    is given.

    Rows of both may be strided, and out may share x's memory.
    """
    from .triton_kernels import rows_kernel

    batch, tokens, columns = x.shape
    rows_kernel[(batch * tokens, divided_up(columns, COLUMNS))](
        x,
        out,
        x_scale,
        out_scale,
        tokens,
        columns,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        BLOCK=COLUMNS,
        SCALED=x_scale is not None,
        GELU=gelu,
        FP8_OUT=out_scale is not None,
    )


@on_its_card
def add_gated(x: Tensor, update: Tensor, gate: Tensor) -> None:
    """Add update * gate to x in place. x and update [B, S, C] (contiguous), gate [B, 1, C]."""
    from .triton_kernels import add_gated_kernel

    batch, tokens, columns = x.shape
    add_gated_kernel[(batch * tokens, divided_up(columns, COLUMNS))](
        x, update, gate, tokens, columns, gate.stride(0), BLOCK=COLUMNS
    )


@on_its_card
def norm_and_rotate(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    pe: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    v_scale: Tensor | None = None,
    text: int = 0,
    repeats: int = 0,
) -> None:
    """Apply RMS norm (eps 1e-6) and rotary positions to the queries and keys in qkv [B, S, 3, H, D].

    Queries go to q [B, S, H, D], keys to k [B, S + repeats, H, D], values to v, shaped like k. D is a power of two, and
    heads are contiguous. q and k may share qkv's memory if there are no repeats; with v None the values stay where they
    are.
    v_scale: if given, all outputs are e4m3 and the values are divided by it.
    q_weight and k_weight [D], pe float32 [B or 1, 1, S, D / 2, 2, 2] with its last three axes contiguous.
    repeats: how many more times to write key and value number text - 1, directly after themselves.
    """
    from .triton_kernels import norm_and_rotate_kernel

    batch, tokens, _, heads, width = qkv.shape
    group = min(HEADS, next_power_of_2(heads))
    v_strides = (0, 0) if v is None else v.stride()[:2]
    norm_and_rotate_kernel[(tokens + repeats, divided_up(heads, group), batch)](
        qkv,
        q_weight,
        k_weight,
        pe,
        q,
        k,
        v,
        v_scale,
        text,
        repeats,
        heads,
        *qkv.stride()[:2],
        pe.stride(0) if pe.shape[0] > 1 else 0,
        pe.stride(2),
        *q.stride()[:2],
        *k.stride()[:2],
        *v_strides,
        1e-6,
        HEADS=group,
        WIDTH=width,
        COPY_V=v is not None,
        FP8_OUT=v_scale is not None,
        num_warps=2,
    )
