"""The Triton kernels that kernels.py launches. Importing this module requires Triton."""

import triton
import triton.language as tl


@triton.jit
def to_output(value, scale, FP8_OUT: tl.constexpr):
    if FP8_OUT:
        value = tl.clamp(value / tl.load(scale), -448.0, 448.0)
    return value


@triton.jit
def modulate_kernel(
    x,
    shift,
    scale,
    out,
    out_scale,
    tokens,
    columns,
    shift_batch,
    scale_batch,
    eps,
    BLOCK: tl.constexpr,
    FP8_OUT: tl.constexpr,
):
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
    value = tl.load(x + row // tokens * x_batch + row % tokens * x_token + cols, mask=cols < columns, other=0.0).to(
        tl.float32
    )
    # The next power of two, by the bits of the exponent.
    bits = ((tl.max(tl.abs(value), axis=0) / 448.0).to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000
    tl.atomic_max(out, bits.to(tl.float32, bitcast=True))


@triton.jit
def rows_kernel(
    x,
    out,
    x_scale,
    out_scale,
    tokens,
    columns,
    x_batch,
    x_token,
    out_row,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    GELU: tl.constexpr,
    FP8_OUT: tl.constexpr,
):
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
def norm_and_rotate_kernel(
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
    qkv_batch,
    qkv_token,
    pe_batch,
    pe_token,
    q_batch,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COPY_V: tl.constexpr,
    FP8_OUT: tl.constexpr,
):
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
    queries = normed_and_rotated(
        queries, tl.load(q_weight + cols).to(tl.float32), rotation, eps, HEADS, WIDTH, qkv.dtype.element_ty
    )
    keys = normed_and_rotated(
        keys, tl.load(k_weight + cols).to(tl.float32), rotation, eps, HEADS, WIDTH, qkv.dtype.element_ty
    )
    tl.store(k + batch * k_batch + row * k_token + here, keys, mask=inside)
    if row < text or row >= text + repeats:
        tl.store(q + batch * q_batch + token * q_token + here, queries, mask=inside)
