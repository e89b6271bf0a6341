"""Triton kernels for what lies between the matrix products of a FLUX block: each reads its input once and writes its result once.

A result can be written as e4m3 for a product on fp8 tensor cores: rounded to value / scale, magnitudes above 448 cut to it. The kernels themselves, in triton_kernels.py,
are imported at the first call, since Triton is not published for every system.
The arithmetic is float32; where the plain path stores a value in the model's dtype before the rotary positions, so does this.
"""

import functools

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
# What one program handles, the fastest on an H200 (docs/performance.md).
COLUMNS = 4096
HEADS = 32


def on_its_card(function):
    """Triton starts a kernel on the current card, whichever its tensors lie on: this makes that of the first argument, a tensor or a list of them, current."""

    @functools.wraps(function)
    def launched(first, *args, **kwargs):
        with torch.cuda.device_of(first[0] if isinstance(first, list) else first):
            return function(first, *args, **kwargs)

    return launched


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def divided_up(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@on_its_card
def modulate(x: Tensor, shift: Tensor, scale: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """Layer norm of x [B, S, C] (eps 1e-6, no weights), times 1 + scale, plus shift ([B, 1, C]) -> [B, S, C] of x's dtype, or e4m3 with out_scale []."""
    from .triton_kernels import modulate_kernel

    batch, tokens, columns = x.shape
    x = x.contiguous()
    out = torch.empty_like(x, dtype=x.dtype if out_scale is None else FP8)
    modulate_kernel[(batch * tokens,)](x, shift, scale, out, out_scale, tokens, columns, shift.stride(0), scale.stride(0), 1e-6,
                                       BLOCK=next_power_of_2(columns), FP8_OUT=out_scale is not None, num_warps=8)
    return out


@on_its_card
def fp8_scale(parts: list[Tensor]) -> Tensor:
    """float32 [], the least power of two times which e4m3 holds the largest magnitude of all parts [B, S, C], whose rows may lie apart; at least 2**-60.

    A power of two rounds nothing but what leaves the range of e4m3 below.
    """
    from .triton_kernels import fp8_scale_kernel

    out = torch.full((), 2.0**-60, device=parts[0].device)
    for x in parts:
        batch, tokens, columns = x.shape
        fp8_scale_kernel[(batch * tokens,)](x, out, tokens, columns, x.stride(0), x.stride(1), BLOCK=next_power_of_2(columns))
    return out


@on_its_card
def copy_rows(x: Tensor, out: Tensor, x_scale: Tensor | None = None, out_scale: Tensor | None = None, gelu: bool = False) -> None:
    """Write x [B, S, C], times x_scale [] and through GELU (tanh) if asked, to out [B * S, C], which is e4m3 with out_scale [].

    Rows of both may lie apart, and out may be x's own memory.
    """
    from .triton_kernels import rows_kernel

    batch, tokens, columns = x.shape
    rows_kernel[(batch * tokens, divided_up(columns, COLUMNS))](x, out, x_scale, out_scale, tokens, columns, x.stride(0), x.stride(1), out.stride(0),
                                                                 BLOCK=COLUMNS, SCALED=x_scale is not None, GELU=gelu, FP8_OUT=out_scale is not None)


@on_its_card
def add_gated(x: Tensor, update: Tensor, gate: Tensor) -> None:
    """x + update * gate, written into x. x and update [B, S, C] (contiguous), gate [B, 1, C]."""
    from .triton_kernels import add_gated_kernel

    batch, tokens, columns = x.shape
    add_gated_kernel[(batch * tokens, divided_up(columns, COLUMNS))](x, update, gate, tokens, columns, gate.stride(0), BLOCK=COLUMNS)


@on_its_card
def norm_and_rotate(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, pe: Tensor, q: Tensor, k: Tensor, v: Tensor | None = None,
                    v_scale: Tensor | None = None, text: int = 0, repeats: int = 0) -> None:
    """RMS norm (eps 1e-6) and rotary positions of the queries and keys in qkv [B, S, 3, H, D], written to q [B, S, H, D] and k [B, S + repeats, H, D]; values to v as to k.

    D is a power of two, heads lie together. q and k may be qkv's own memory if there are no repeats; v None leaves the values where they are.
    All outputs are e4m3 if v_scale [] is given, by which the values are divided.
    q_weight and k_weight [D], pe float32 [B or 1, 1, S, D / 2, 2, 2] with the last three axes together.
    repeats: how often key and value number text - 1 are written again, behind themselves.
    """
    from .triton_kernels import norm_and_rotate_kernel

    batch, tokens, _, heads, width = qkv.shape
    group = min(HEADS, next_power_of_2(heads))
    v_strides = (0, 0) if v is None else v.stride()[:2]
    norm_and_rotate_kernel[(tokens + repeats, divided_up(heads, group), batch)](
        qkv, q_weight, k_weight, pe, q, k, v, v_scale, text, repeats, heads, *qkv.stride()[:2], pe.stride(0) if pe.shape[0] > 1 else 0, pe.stride(2), *q.stride()[:2],
        *k.stride()[:2], *v_strides, 1e-6, HEADS=group, WIDTH=width, COPY_V=v is not None, FP8_OUT=v_scale is not None, num_warps=2)
