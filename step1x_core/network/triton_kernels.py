"""The Triton kernels that kernels.py launches. Importing this module requires Triton."""

import triton
import triton.language as tl


@triton.jit
def to_output(value, scale, FP8_OUT: tl.constexpr):
    if FP8_OUT:
        value = tl.clamp(value / tl.load(scale), -448.0, 448.0)
    return value


@triton.jit
def pair_of(row, tokens, batches):
    """The batch and the token of a row, and the batch that it is paired with: half of the batches further on."""
    batch = row // tokens
    return batch, row % tokens, batch + batches // 2


@triton.jit
def normed(x, columns, cols, inside, eps):
    value = tl.load(x + cols, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value - tl.sum(value, axis=0) / columns, 0.0)
    return value * tl.rsqrt(tl.sum(value * value, axis=0) / columns + eps)


@triton.jit
def modulated(value, shift, scale, cols, inside):
    value = value * (1.0 + tl.load(scale + cols, mask=inside, other=0.0).to(tl.float32))
    return value + tl.load(shift + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def unpaired(x, other, bias, here, inside):
    """Both members of a pair from the products of their mean and of half their difference, and the bias."""
    mean = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    mean += tl.load(bias + here, mask=inside, other=0.0).to(tl.float32)
    half = tl.load(other + here, mask=inside, other=0.0).to(tl.float32)
    return mean + half, mean - half


@triton.jit
def store_pair(out, other, first, second, scale, here, inside):
    """Store mean and half the difference of a pair as e4m3 on a scale."""
    tl.store(out + here, to_output((first + second) / 2, scale, True).to(out.dtype.element_ty), mask=inside)
    tl.store(other + here, to_output((first - second) / 2, scale, True).to(out.dtype.element_ty), mask=inside)


@triton.jit
def modulate_pairs_kernel(
    x, shift, scale, out, out_scale, tokens, columns, batches, shift_batch, scale_batch, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    batch, token, other = pair_of(row, tokens, batches)
    cols = tl.arange(0, BLOCK)
    inside = cols < columns
    here, there = row * columns, (other * tokens + token) * columns
    first = normed(x + here, columns, cols, inside, eps)
    first = modulated(first, shift + batch * shift_batch, scale + batch * scale_batch, cols, inside)
    second = normed(x + there, columns, cols, inside, eps)
    second = modulated(second, shift + other * shift_batch, scale + other * scale_batch, cols, inside)
    store_pair(out + here, out + there, first, second, out_scale, cols, inside)


@triton.jit
def pair_rows_kernel(
    x,
    out,
    x_scale,
    out_scale,
    bias,
    tokens,
    columns,
    batches,
    x_batch,
    x_token,
    out_row,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    GELU: tl.constexpr,
    PAIRED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token, other = pair_of(row, tokens, batches)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    here, there = x + batch * x_batch + token * x_token, x + other * x_batch + token * x_token
    if PAIRED:
        first, second = unpaired(here, there, bias, cols, inside)
    else:
        first = tl.load(here + cols, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(there + cols, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        first, second = first * tl.load(x_scale), second * tl.load(x_scale)
    if GELU:
        first, second = gelu(first), gelu(second)
    store_pair(out + row * out_row, out + (other * tokens + token) * out_row, first, second, out_scale, cols, inside)


@triton.jit
def add_gated_pairs_kernel(
    x, update, gate, bias, tokens, columns, batches, x_batch, x_token, gate_batch, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    batch, token, other = pair_of(row, tokens, batches)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    first, second = unpaired(
        update + row * columns, update + (other * tokens + token) * columns, bias, cols, inside
    )
    here, there = x + batch * x_batch + token * x_token + cols, x + other * x_batch + token * x_token + cols
    first *= tl.load(gate + batch * gate_batch + cols, mask=inside, other=0.0).to(tl.float32)
    second *= tl.load(gate + other * gate_batch + cols, mask=inside, other=0.0).to(tl.float32)
    first += tl.load(here, mask=inside, other=0.0).to(tl.float32)
    second += tl.load(there, mask=inside, other=0.0).to(tl.float32)
    tl.store(here, first.to(x.dtype.element_ty), mask=inside)
    tl.store(there, second.to(x.dtype.element_ty), mask=inside)


@triton.jit
def gelu(value):
    # The tanh approximation: (1 + tanh(u)) / 2 is sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
    return value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))


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
    value = normed(x + row * columns, columns, cols, inside, eps)
    value = modulated(value, shift + batch * shift_batch, scale + batch * scale_batch, cols, inside)
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
    if GELU:
        value = gelu(value)
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


@triton.jit
def rounded_to(value, DTYPE: tl.constexpr):
    return value.to(DTYPE).to(tl.float32)


@triton.jit
def norm_and_rotate_pairs_kernel(
    qkv,
    bias,
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
    batches,
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
    FP8_OUT: tl.constexpr,
):
    batch, row = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64)
    other = batch + batches // 2
    token = tl.where(row < text, row, tl.maximum(row - repeats, text - 1))
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    cols = tl.arange(0, WIDTH)
    inside = (head < heads)[:, None] & (cols < WIDTH)[None, :]
    here = head[:, None] * WIDTH + cols[None, :]
    mean, half = qkv + batch * qkv_batch + token * qkv_token, qkv + other * qkv_batch + token * qkv_token
    size = heads * WIDTH
    own, others = pe + batch * pe_batch + token * pe_token, pe + other * pe_batch + token * pe_token
    places = tl.arange(0, WIDTH // 2) * 4
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    first, second = unpaired(mean + 2 * size, half + 2 * size, bias + 2 * size, here, inside)
    if FP8_OUT:
        first, second = to_output(first, v_scale, True), to_output(second, v_scale, True)
    tl.store(v + batch * v_batch + row * v_token + here, first.to(v.dtype.element_ty), mask=inside)
    tl.store(v + other * v_batch + row * v_token + here, second.to(v.dtype.element_ty), mask=inside)
    first, second = unpaired(mean + size, half + size, bias + size, here, inside)
    weight = tl.load(k_weight + cols).to(tl.float32)
    first = normed_and_rotated(rounded_to(first, DTYPE), weight, own + places, eps, HEADS, WIDTH, DTYPE)
    second = normed_and_rotated(rounded_to(second, DTYPE), weight, others + places, eps, HEADS, WIDTH, DTYPE)
    tl.store(k + batch * k_batch + row * k_token + here, first.to(k.dtype.element_ty), mask=inside)
    tl.store(k + other * k_batch + row * k_token + here, second.to(k.dtype.element_ty), mask=inside)
    if row < text or row >= text + repeats:
        first, second = unpaired(mean, half, bias, here, inside)
        weight = tl.load(q_weight + cols).to(tl.float32)
        first = normed_and_rotated(rounded_to(first, DTYPE), weight, own + places, eps, HEADS, WIDTH, DTYPE)
        second = normed_and_rotated(rounded_to(second, DTYPE), weight, others + places, eps, HEADS, WIDTH, DTYPE)
        tl.store(q + batch * q_batch + token * q_token + here, first.to(q.dtype.element_ty), mask=inside)
        tl.store(q + other * q_batch + token * q_token + here, second.to(q.dtype.element_ty), mask=inside)
