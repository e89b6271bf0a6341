"""Triton kernels for one step of a language model that writes text: a few rows, each one token. Bound by reading
weights. Called through decode_kernels.py."""

import triton
import triton.language as tl


@triton.jit
def norm_kernel(x, weight, out, columns, eps, BLOCK: tl.constexpr):
    """RMS norm of a row; a program is a row."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values) / columns + eps)
    values *= scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(x, parts, weight, out, normed, rows, columns, eps, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the results of a product, float32 [SPLITS, rows, columns], to a row of x, and its RMS norm; a program is a
    row."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(parts + (split * rows + row) * columns + at, mask=inside, other=0.0)
    # Rounded before and after, as by operations of their own.
    values = sums.to(x.dtype.element_ty) + tl.load(x + row * columns + at, mask=inside, other=0.0)
    tl.store(out + row * columns + at, values, mask=inside)
    values = values.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values) / columns + eps)
    values *= scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * columns + at, values.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def project_kernel(x, w0, w1, w2, s0, s1, s2, b0, b1, b2, out, rows, n0, n1, n2, COLUMNS: tl.constexpr,
                   SCALED: tl.constexpr, BIASED: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """x [rows, COLUMNS] times up to three weights [n, COLUMNS], side by side in out [SPLITS, rows, n0 + n1 + n2], to be
    added up.

    A program is BLOCK_N outputs of ROWS rows and a part of the inputs. The sums do not depend on the number of rows.
    """
    block, split = tl.program_id(0), tl.program_id(2)
    blocks0, blocks1 = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
    w, s, b, count, base, first = w0, s0, b0, n0, 0, block
    if block >= blocks0:
        if block < blocks0 + blocks1:
            w, s, b, count, base, first = w1, s1, b1, n1, n0, block - blocks0
        else:
            w, s, b, count, base, first = w2, s2, b2, n2, n0 + n1, block - blocks0 - blocks1
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = first * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there = m < rows
    x_at = x + m[:, None] * COLUMNS + k[None, :]
    w_at = w + n[None, :] * COLUMNS + k[:, None]
    sums = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    part: tl.constexpr = (COLUMNS // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K
    begin = split * part
    for start in range(begin, tl.minimum(begin + part, COLUMNS), BLOCK_K):
        left = tl.load(x_at + start, mask=there[:, None], other=0.0)
        right = tl.load(w_at + start, mask=(n < count)[None, :], other=0.0)
        sums = tl.dot(left, right.to(left.dtype), sums)
    if SCALED:
        sums *= tl.load(s)
    if BIASED:
        if split == 0:
            sums += tl.load(b + n, mask=n < count, other=0.0).to(tl.float32)[None, :]
    at = (split * rows + m[:, None]) * (n0 + n1 + n2) + base + n[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=there[:, None] & (n < count)[None, :])


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(x, gate, up, gate_scale, up_scale, out, rows, outputs, COLUMNS: tl.constexpr, SCALED: tl.constexpr,
                ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """silu(x @ gate^T) * (x @ up^T): x [rows, COLUMNS], weights [outputs, COLUMNS], out [rows, outputs]."""
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there, wanted = m < rows, n < outputs
    x_at = x + m[:, None] * COLUMNS + k[None, :]
    w_at = n[None, :] * COLUMNS + k[:, None]
    gated = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    upper = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for start in range(0, COLUMNS, BLOCK_K):
        left = tl.load(x_at + start, mask=there[:, None], other=0.0)
        gated = tl.dot(left, tl.load(gate + w_at + start, mask=wanted[None, :], other=0.0).to(left.dtype), gated)
        upper = tl.dot(left, tl.load(up + w_at + start, mask=wanted[None, :], other=0.0).to(left.dtype), upper)
    if SCALED:
        gated *= tl.load(gate_scale)
        upper *= tl.load(up_scale)
    # Rounded where separate operations would store them.
    gated = gated.to(out.dtype.element_ty).to(tl.float32)
    gated = (gated / (1 + tl.exp(-gated))).to(out.dtype.element_ty)
    upper = upper.to(out.dtype.element_ty)
    tl.store(out + m[:, None] * outputs + n[None, :], gated * upper, mask=there[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["rows"])
def rotate_kernel(qkv, cos, sin, lengths, q, keys, values, rows, row_stride, token_stride, head_stride,
                  SPLITS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr):
    """Add up a head's query or key, float32 [SPLITS, rows, HEADS + 2 * KV_HEADS, 2 * HALF], and rotate it by its
    position; write the query to q [rows, HEADS, 2 * HALF], key and value to place lengths[row] of the cache. A program
    is a head of a row."""
    row, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, HALF)
    x, y = tl.zeros((HALF,), dtype=tl.float32), tl.zeros((HALF,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        source = qkv + ((split * rows + row) * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF
        x += tl.load(source + at)
        y += tl.load(source + HALF + at)
    a, b = x.to(q.dtype.element_ty), y.to(q.dtype.element_ty)
    if head < HEADS + KV_HEADS:
        c, s = tl.load(cos + row * HALF + at), tl.load(sin + row * HALF + at)
        x, y = a.to(tl.float32), b.to(tl.float32)
        a, b = (x * c - y * s).to(a.dtype), (y * c + x * s).to(b.dtype)
    place = row.to(tl.int64) * row_stride + tl.load(lengths + row) * token_stride
    if head < HEADS:
        target = q + (row * HEADS + head) * 2 * HALF
    elif head < HEADS + KV_HEADS:
        target = keys + place + (head - HEADS) * head_stride
    else:
        target = values + place + (head - HEADS - KV_HEADS) * head_stride
    tl.store(target + at, a)
    tl.store(target + HALF + at, b)


@triton.jit(do_not_specialize=["splits"])
def attend_kernel(q, keys, values, lengths, parts, tops, totals, scale, splits, row_stride, token_stride, head_stride,
                  HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                  CHUNK: tl.constexpr):
    """Attention of the queries that share a key head over CHUNK tokens; `join_kernel` adds the chunks up.

    A program is a chunk of a head of a row. Chunks that hold no token end at once: they cost next to nothing.
    parts: float32 [rows, HEADS, splits, WIDTH]; tops, totals: float32 [rows, HEADS, splits].
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row) + 1
    start = split * CHUNK
    if start < length:
        group: tl.constexpr = HEADS // KV_HEADS
        g = tl.arange(0, ROWS)
        d = tl.arange(0, WIDTH)
        token = start + tl.arange(0, CHUNK)
        own, filled = g < group, token < length
        queries = row * HEADS + head * group + g
        query = tl.load(q + queries[:, None] * WIDTH + d[None, :], mask=own[:, None], other=0.0)
        place = row.to(tl.int64) * row_stride + head * head_stride
        key = tl.load(keys + place + token[None, :] * token_stride + d[:, None], mask=filled[None, :], other=0.0)
        scores = tl.where(filled[None, :], tl.dot(query, key) * scale, -float("inf"))
        top = tl.max(scores, 1)
        weights = tl.exp(scores - top[:, None])
        value = tl.load(values + place + token[:, None] * token_stride + d[None, :], mask=filled[:, None], other=0.0)
        part = tl.dot(weights.to(value.dtype), value)
        at = queries * splits + split
        tl.store(parts + at[:, None] * WIDTH + d[None, :], part, mask=own[:, None])
        tl.store(tops + at, top, mask=own)
        tl.store(totals + at, tl.sum(weights, 1), mask=own)


@triton.jit(do_not_specialize=["splits"])
def join_kernel(parts, tops, totals, lengths, out, splits, HEADS: tl.constexpr, WIDTH: tl.constexpr,
                CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the chunks of a head; a program is a head of a row. out: [rows, HEADS, WIDTH]."""
    row, head = tl.program_id(0), tl.program_id(1)
    used = (tl.load(lengths + row) + CHUNK) // CHUNK
    base = (row * HEADS + head) * splits
    d = tl.arange(0, WIDTH)
    top = -float("inf")
    total = 0.0
    result = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, used, BLOCK):
        s = start + tl.arange(0, BLOCK)
        there = s < used
        own = tl.load(tops + base + s, mask=there, other=-float("inf"))
        new = tl.maximum(top, tl.max(own))
        weights = tl.exp(own - new)
        old = tl.exp(top - new)
        part = tl.load(parts + (base + s)[:, None] * WIDTH + d[None, :], mask=there[:, None], other=0.0)
        result = result * old + tl.sum(part * weights[:, None], 0)
        total = total * old + tl.sum(tl.load(totals + base + s, mask=there, other=0.0) * weights)
        top = new
    tl.store(out + (row * HEADS + head) * WIDTH + d, (result / total).to(out.dtype.element_ty))
