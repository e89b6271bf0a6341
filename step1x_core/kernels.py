"""Triton kernels for what lies between the matrix products of a FLUX block: each reads its input once and writes its result once.

A result can be written as e4m3 for a product on fp8 tensor cores: rounded to value / scale, magnitudes above 448 cut to it. Importing this module needs Triton.
The arithmetic is float32; where the plain path stores a value in the model's dtype before the rotary positions, so does this.
"""

import functools

import torch
import triton
import triton.language as tl
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


@triton.jit
def to_output(value, scale, FP8_OUT: tl.constexpr):
    if FP8_OUT:
        value = tl.clamp(value / tl.load(scale), -448.0, 448.0)
    return value


@triton.jit
def modulate_kernel(x, shift, scale, out, out_scale, tokens, columns, shift_batch, scale_batch, eps, BLOCK: tl.constexpr, FP8_OUT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    cols = tl.arange(0, BLOCK)
    inside = cols < columns
    value = tl.load(x + row * columns + cols, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value - tl.sum(value, axis=0) / columns, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / columns + eps)
    value = value * (1.0 + tl.load(scale + batch * scale_batch + cols, mask=inside, other=0.0).to(tl.float32))
    value = value + tl.load(shift + batch * shift_batch + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + cols, to_output(value, out_scale, FP8_OUT).to(out.dtype.element_ty), mask=inside)


@triton.jit
def fp8_scale_kernel(x, out, tokens, columns, x_batch, x_token, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    value = tl.load(x + row // tokens * x_batch + row % tokens * x_token + cols, mask=cols < columns, other=0.0).to(tl.float32)
    # The next power of two, by the bits of the exponent.
    bits = ((tl.max(tl.abs(value), axis=0) / 448.0).to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000
    tl.atomic_max(out, bits.to(tl.float32, bitcast=True))


@triton.jit
def rows_kernel(x, out, x_scale, out_scale, tokens, columns, x_batch, x_token, out_row, BLOCK: tl.constexpr, SCALED: tl.constexpr, GELU: tl.constexpr,
                FP8_OUT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    value = tl.load(x + row // tokens * x_batch + row % tokens * x_token + cols, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value = value * tl.load(x_scale)
    if GELU:  # the tanh approximation: (1 + tanh(u)) / 2 is sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    tl.store(out + row * out_row + cols, to_output(value, out_scale, FP8_OUT).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_gated_kernel(x, update, gate, tokens, columns, gate_batch, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    factor = tl.load(gate + row // tokens * gate_batch + cols, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * columns + cols, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(update + row * columns + cols, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(x + row * columns + cols, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def normed_and_rotated(value, weight, rotation, eps, HEADS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    value = value * tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)[:, None] * weight[None, :]
    first, second = tl.split(tl.reshape(value.to(DTYPE).to(tl.float32), (HEADS, WIDTH // 2, 2)))
    rotated_first = tl.load(rotation)[None, :] * first + tl.load(rotation + 1)[None, :] * second
    rotated_second = tl.load(rotation + 2)[None, :] * first + tl.load(rotation + 3)[None, :] * second
    return tl.reshape(tl.join(rotated_first, rotated_second), (HEADS, WIDTH)).to(DTYPE)


@triton.jit
def norm_and_rotate_kernel(qkv, q_weight, k_weight, pe, q, k, v, v_scale, text, repeats, heads, qkv_batch, qkv_token, pe_batch, pe_token, q_batch, q_token, k_batch, k_token,
                           v_batch, v_token, eps, HEADS: tl.constexpr, WIDTH: tl.constexpr, COPY_V: tl.constexpr, FP8_OUT: tl.constexpr):
    batch, row = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64)
    token = tl.where(row < text, row, tl.maximum(row - repeats, text - 1))
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    cols = tl.arange(0, WIDTH)
    inside = (head < heads)[:, None] & (cols < WIDTH)[None, :]
    here = head[:, None] * WIDTH + cols[None, :]
    source = qkv + batch * qkv_batch + token * qkv_token + here
    rotation = pe + batch * pe_batch + token * pe_token + tl.arange(0, WIDTH // 2) * 4
    queries = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    keys = tl.load(source + heads * WIDTH, mask=inside, other=0.0).to(tl.float32)
    if COPY_V:
        values = tl.load(source + 2 * heads * WIDTH, mask=inside, other=0.0)
        if FP8_OUT:
            values = to_output(values.to(tl.float32), v_scale, FP8_OUT).to(v.dtype.element_ty)
        tl.store(v + batch * v_batch + row * v_token + here, values, mask=inside)
    queries = normed_and_rotated(queries, tl.load(q_weight + cols).to(tl.float32), rotation, eps, HEADS, WIDTH, qkv.dtype.element_ty)
    keys = normed_and_rotated(keys, tl.load(k_weight + cols).to(tl.float32), rotation, eps, HEADS, WIDTH, qkv.dtype.element_ty)
    tl.store(k + batch * k_batch + row * k_token + here, keys, mask=inside)
    if row < text or row >= text + repeats:
        tl.store(q + batch * q_batch + token * q_token + here, queries, mask=inside)


@on_its_card
def modulate(x: Tensor, shift: Tensor, scale: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """Layer norm of x [B, S, C] (eps 1e-6, no weights), times 1 + scale, plus shift ([B, 1, C]) -> [B, S, C] of x's dtype, or e4m3 with out_scale []."""
    batch, tokens, columns = x.shape
    x = x.contiguous()
    out = torch.empty_like(x, dtype=x.dtype if out_scale is None else FP8)
    modulate_kernel[(batch * tokens,)](x, shift, scale, out, out_scale, tokens, columns, shift.stride(0), scale.stride(0), 1e-6,
                                       BLOCK=triton.next_power_of_2(columns), FP8_OUT=out_scale is not None, num_warps=8)
    return out


@on_its_card
def fp8_scale(parts: list[Tensor]) -> Tensor:
    """float32 [], the least power of two times which e4m3 holds the largest magnitude of all parts [B, S, C], whose rows may lie apart; at least 2**-60.

    A power of two rounds nothing but what leaves the range of e4m3 below.
    """
    out = torch.full((), 2.0**-60, device=parts[0].device)
    for x in parts:
        batch, tokens, columns = x.shape
        fp8_scale_kernel[(batch * tokens,)](x, out, tokens, columns, x.stride(0), x.stride(1), BLOCK=triton.next_power_of_2(columns))
    return out


@on_its_card
def copy_rows(x: Tensor, out: Tensor, x_scale: Tensor | None = None, out_scale: Tensor | None = None, gelu: bool = False) -> None:
    """Write x [B, S, C], times x_scale [] and through GELU (tanh) if asked, to out [B * S, C], which is e4m3 with out_scale [].

    Rows of both may lie apart, and out may be x's own memory.
    """
    batch, tokens, columns = x.shape
    rows_kernel[(batch * tokens, triton.cdiv(columns, COLUMNS))](x, out, x_scale, out_scale, tokens, columns, x.stride(0), x.stride(1), out.stride(0),
                                                                 BLOCK=COLUMNS, SCALED=x_scale is not None, GELU=gelu, FP8_OUT=out_scale is not None)


@on_its_card
def add_gated(x: Tensor, update: Tensor, gate: Tensor) -> None:
    """x + update * gate, written into x. x and update [B, S, C] (contiguous), gate [B, 1, C]."""
    batch, tokens, columns = x.shape
    add_gated_kernel[(batch * tokens, triton.cdiv(columns, COLUMNS))](x, update, gate, tokens, columns, gate.stride(0), BLOCK=COLUMNS)


@on_its_card
def norm_and_rotate(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, pe: Tensor, q: Tensor, k: Tensor, v: Tensor | None = None,
                    v_scale: Tensor | None = None, text: int = 0, repeats: int = 0) -> None:
    """RMS norm (eps 1e-6) and rotary positions of the queries and keys in qkv [B, S, 3, H, D], written to q [B, S, H, D] and k [B, S + repeats, H, D]; values to v as to k.

    D is a power of two, heads lie together. q and k may be qkv's own memory if there are no repeats; v None leaves the values where they are.
    All outputs are e4m3 if v_scale [] is given, by which the values are divided.
    q_weight and k_weight [D], pe float32 [B or 1, 1, S, D / 2, 2, 2] with the last three axes together.
    repeats: how often key and value number text - 1 are written again, behind themselves.
    """
    batch, tokens, _, heads, width = qkv.shape
    group = min(HEADS, triton.next_power_of_2(heads))
    v_strides = (0, 0) if v is None else v.stride()[:2]
    norm_and_rotate_kernel[(tokens + repeats, triton.cdiv(heads, group), batch)](
        qkv, q_weight, k_weight, pe, q, k, v, v_scale, text, repeats, heads, *qkv.stride()[:2], pe.stride(0) if pe.shape[0] > 1 else 0, pe.stride(2), *q.stride()[:2],
        *k.stride()[:2], *v_strides, 1e-6, HEADS=group, WIDTH=width, COPY_V=v is not None, FP8_OUT=v_scale is not None, num_warps=2)
