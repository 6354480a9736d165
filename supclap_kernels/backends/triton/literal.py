"""Rows with a small gap in Triton: their support vectors are taken literally, in IEEE float32.

The tiles skip these rows (OFFSET). Here s = x + c (y_own - x) is built from the rows and multiplied
out, for SUPPORT_ROWS with X, Y = T, A and, in `mirror`, for OTHER_ROWS with X, Y = A, T. Which rows
they are is known on the device alone (`list_literal`): every grid is as large as if all were
literal, and programs without work return at once. Few literal rows leave many programs idle, so the
compared rows are split among them.
"""

import triton
import triton.language as tl

from .tile import (
    AUDIO_INVERSE,
    BIAS,
    HIDDEN,
    OFFSET,
    OTHER_ROWS,
    RHO_LITERAL,
    SHARED,
    STATE_GEOMETRY,
    SUPPORT_AUDIO,
    SUPPORT_ROWS,
    SUPPORT_TEXT,
    TEXT_INVERSE,
    C,
    log_sum,
    logit_bias_2,
    logit_scale_2,
    merge_pair,
    negatives,
    slope,
)


@triton.jit(do_not_specialize=["N"])
def list_literal(state, index, count, N, BLOCK: tl.constexpr):
    """index (N,) int32: the literal rows, in order; count () int32: how many. One program."""
    total = 0
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        offset = tl.load(state + (STATE_GEOMETRY + OFFSET) * N + i, mask=i < N, other=0.0)
        literal = (offset != 0.0).to(tl.int32)
        tl.store(index + total + tl.cumsum(literal, 0) - 1, i, mask=literal == 1)
        total += tl.sum(literal, 0)
    tl.store(count, total)


@triton.jit
def literal_share(
    index, count, first, capacity, max_splits, N, LITERAL: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """This program's literal rows n of the list, i of the batch, and its range of compared rows.

    The list is looked at from `first` on; `capacity` programs have a slot for results. slot < 0:
    this one has no work.
    """
    total = tl.minimum(tl.load(count) - first, capacity * LITERAL)
    blocks = tl.maximum(tl.cdiv(total, LITERAL), 1)
    splits = tl.maximum(tl.minimum(capacity // blocks, max_splits), 1)
    program = tl.program_id(0)
    busy = (total > 0) & (program < blocks * splits)
    n = (program % blocks) * LITERAL + tl.arange(0, LITERAL)
    in_i = n < total
    i = tl.load(index + first + n, mask=in_i, other=0)
    width = tl.cdiv(tl.cdiv(N, splits), BLOCK_J) * BLOCK_J
    start = (program // blocks) * width
    slot = tl.where(busy, program, -1)
    return slot, i, in_i, start, tl.minimum(start + width, N), splits, blocks


@triton.jit
def load_rows(X, i, inside, d0, width, BLOCK_D: tl.constexpr):
    """Rows i, columns from d0, float32."""
    d = d0 + tl.arange(0, BLOCK_D)
    at = X + i.to(tl.int64)[:, None] * width + d[None, :]
    return tl.load(at, mask=inside[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def literal_products(
    X, Y, c, i, j, in_i, in_j, width,
    LITERAL: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<s_i, y_j> (LITERAL, BLOCK_J)."""
    product = tl.zeros([LITERAL, BLOCK_J], tl.float32)
    for d0 in range(0, width, BLOCK_D):
        x = load_rows(X, i, in_i, d0, width, BLOCK_D)
        s = x + c[:, None] * (load_rows(Y, i, in_i, d0, width, BLOCK_D) - x)
        y = load_rows(Y, j, in_j, d0, width, BLOCK_D)
        product = tl.dot(s, y.T, product, input_precision="ieee")  # [LITERAL, D] @ [D, BLOCK_J]
    return product


@triton.jit
def literal_row_scalars(state, i, in_i, N, DIRECTION: tl.constexpr):
    """c and 1 / |s|."""
    inverse_row = TEXT_INVERSE if DIRECTION == SUPPORT_ROWS else AUDIO_INVERSE
    c = tl.load(state + (STATE_GEOMETRY + C) * N + i, mask=in_i, other=0.0)
    return c, tl.load(state + (STATE_GEOMETRY + inverse_row) * N + i, mask=in_i, other=0.0)


@triton.jit
def literal_negatives(i, j, in_i, in_j, ids, split):
    """Pairs of negatives; with split > 0 those of a row before it with one from it on."""
    across = (split == 0) | ((i < split)[:, None] != (j < split)[None, :])
    return negatives(i, j, in_i, in_j, ids, True) & across


@triton.jit
def literal_slopes(
    product, factors, b, k2, i, j, in_i, in_j, ids, N, split,
    DIRECTION: tl.constexpr, MODE: tl.constexpr, INFONCE: tl.constexpr,
):  # fmt: skip
    """Slopes h towards the logits k2 product + b of literal rows; 0 where a pair does not count."""
    z = k2 * product
    h = slope(z + b, factors, DIRECTION, i, in_i, N, 1, INFONCE)
    if MODE == SHARED:
        h += slope(z, factors, OTHER_ROWS, j, in_j, N, 0, INFONCE)
    return tl.where(literal_negatives(i, j, in_i, in_j, ids, split), h, 0.0)


@triton.jit(
    do_not_specialize=["N", "split", "capacity", "max_splits"],
    do_not_specialize_on_alignment=["scale", "bias", "ids"],
)
def literal_rows(
    X, Y,  # (N, width) operands
    state, ids, scale, bias, index, count,
    factors,  # None: sweep 1
    part,  # (2, capacity LITERAL) float32: m, l;  with factors: sums of support, bias
    N, width, split, capacity, max_splits,
    DIRECTION: tl.constexpr, MODE: tl.constexpr, INFONCE: tl.constexpr,
    LITERAL: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial statistics, or sums of the gradient, of LITERAL literal rows."""
    slot, i, in_i, start, end, _splits, _blocks = literal_share(
        index, count, 0, capacity, max_splits, N, LITERAL, BLOCK_J
    )
    if slot < 0:
        return
    k2 = logit_scale_2(scale)
    b = logit_bias_2(bias, INFONCE)
    c, inverse = literal_row_scalars(state, i, in_i, N, DIRECTION)
    first = tl.zeros([LITERAL], tl.float32) + (HIDDEN if factors is None else 0.0)
    second = tl.zeros([LITERAL], tl.float32)
    for j0 in range(start, end, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        in_j = j < end
        product = literal_products(X, Y, c, i, j, in_i, in_j, width, LITERAL, BLOCK_J, BLOCK_D)
        product *= inverse[:, None]
        if factors is None:
            z = tl.where(literal_negatives(i, j, in_i, in_j, ids, split), k2 * product + b, HIDDEN)
            m, l = log_sum(z, 1, INFONCE)
            first, second = merge_pair(first, second, m, l, INFONCE)
        else:
            h = literal_slopes(
                product, factors, b, k2, i, j, in_i, in_j, ids, N, split, DIRECTION, MODE, INFONCE
            )
            first += tl.sum(h * (k2 * product), 1)
            second += tl.sum(h, 1)
    at = part + slot * LITERAL + tl.arange(0, LITERAL)
    plane = capacity * LITERAL
    tl.store(at, first)
    tl.store(at + plane, second)


@triton.jit(do_not_specialize=["N", "capacity", "max_splits"])
def merge_literal_rows(
    part, index, count,
    running,  # (10, N) or None
    sums,  # (7, N) or None
    N, capacity, max_splits,
    DIRECTION: tl.constexpr, INFONCE: tl.constexpr, LITERAL: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The parts of `literal_rows`, in order, into the running statistics (replacing what the tiles
    saw of hidden logits), or added to the sums."""
    slot, i, in_i, _start, _end, splits, blocks = literal_share(
        index, count, 0, capacity, max_splits, N, LITERAL, BLOCK_J
    )
    if (slot < 0) | (slot >= blocks):
        return
    plane = capacity * LITERAL
    first = tl.zeros([LITERAL], tl.float32) + (HIDDEN if sums is None else 0.0)
    second = tl.zeros([LITERAL], tl.float32)
    at = part + slot * LITERAL + tl.arange(0, LITERAL)
    for _ in range(0, splits):
        if sums is None:
            m, l = tl.load(at), tl.load(at + plane)
            first, second = merge_pair(first, second, m, l, INFONCE)
        else:
            first += tl.load(at)
            second += tl.load(at + plane)
        at += blocks * LITERAL
    if sums is None:
        tl.store(running + 2 * DIRECTION * N + i, first, mask=in_i)
        tl.store(running + (2 * DIRECTION + 1) * N + i, second, mask=in_i)
    else:
        support = sums + (SUPPORT_TEXT if DIRECTION == SUPPORT_ROWS else SUPPORT_AUDIO) * N + i
        tl.store(support, first + tl.load(support, mask=in_i, other=0.0), mask=in_i)
        bias = sums + BIAS * N + i
        tl.store(bias, second + tl.load(bias, mask=in_i, other=0.0), mask=in_i)


@triton.jit(
    do_not_specialize=["N", "split", "first", "capacity", "max_splits"],
    do_not_specialize_on_alignment=["scale", "bias", "ids"],
)
def literal_gradient(
    X, Y, state, ids, scale, bias, index, count, factors,
    part,  # (capacity LITERAL, width) float32: sum_j h_ij y_j over a range of j
    N, width, split, first, capacity, max_splits,
    DIRECTION: tl.constexpr, MODE: tl.constexpr, INFONCE: tl.constexpr,
    LITERAL: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradient of the literal support vectors; program_id(1) is a chunk of CHUNK columns."""
    slot, i, in_i, start, end, _splits, _blocks = literal_share(
        index, count, first, capacity, max_splits, N, LITERAL, BLOCK_J
    )
    if slot < 0:
        return
    k2 = logit_scale_2(scale)
    b = logit_bias_2(bias, INFONCE)
    c, inverse = literal_row_scalars(state, i, in_i, N, DIRECTION)
    total = tl.zeros([LITERAL, CHUNK], tl.float32)
    d0 = tl.program_id(1) * CHUNK
    for j0 in range(start, end, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        in_j = j < end
        product = literal_products(X, Y, c, i, j, in_i, in_j, width, LITERAL, BLOCK_J, BLOCK_D)
        product *= inverse[:, None]
        h = literal_slopes(
            product, factors, b, k2, i, j, in_i, in_j, ids, N, split, DIRECTION, MODE, INFONCE
        )
        y = load_rows(Y, j, in_j, d0, width, CHUNK)
        total = tl.dot(h, y, total, input_precision="ieee")  # [LITERAL, J] @ [J, CHUNK]
    d = d0 + tl.arange(0, CHUNK)
    n = (slot * LITERAL + tl.arange(0, LITERAL)).to(tl.int64)
    tl.store(part + n[:, None] * width + d[None, :], total, mask=(d < width)[None, :])


@triton.jit
def literal_row(
    X, Y, part, c, inverse, positive, slot, blocks, splits, i, in_i, d0, width,
    LITERAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Columns from d0 of the gradient of s / |s|, positive included; of s / |s|; and of y - x."""
    d = d0 + tl.arange(0, CHUNK)
    n = (slot * LITERAL + tl.arange(0, LITERAL)).to(tl.int64)
    at = part + n[:, None] * width + d[None, :]
    g = tl.zeros([LITERAL, CHUNK], tl.float32)
    for _ in range(0, splits):
        g += tl.load(at, mask=(d < width)[None, :], other=0.0)
        at += blocks.to(tl.int64) * LITERAL * width
    x = load_rows(X, i, in_i, d0, width, CHUNK)
    y = load_rows(Y, i, in_i, d0, width, CHUNK)
    unit = (x + c[:, None] * (y - x)) * inverse[:, None]
    return g + positive[:, None] * y, unit, y - x


@triton.jit(do_not_specialize=["N", "first", "capacity", "max_splits"])
def finish_literal(
    X, Y, state, index, count,
    slopes,  # (2, N) float32: towards the positives' logits, of the sides, in the weights' unit
    part,  # of `literal_gradient`
    sums,  # (7, N): RHO_LITERAL
    dX, dY,  # (N, width) float32 or None
    N, width, first, capacity, max_splits,
    DIRECTION: tl.constexpr, RENORMALIZE: tl.constexpr,
    LITERAL: tl.constexpr, BLOCK_J: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """From the gradient of s: dX_i += (1 - c) ds_i, dY_i += c ds_i + H_ii s_i, and rho. With
    RENORMALIZE ds is first made tangent to the sphere, as a vector: what rounding put along s is
    gone."""
    slot, i, in_i, _start, _end, splits, blocks = literal_share(
        index, count, first, capacity, max_splits, N, LITERAL, BLOCK_J
    )
    if (slot < 0) | (slot >= blocks):
        return
    c, inverse = literal_row_scalars(state, i, in_i, N, DIRECTION)
    positive = tl.load(slopes + (DIRECTION - SUPPORT_ROWS) * N + i, mask=in_i, other=0.0)
    along = tl.zeros([LITERAL], tl.float32)
    if RENORMALIZE:
        for d0 in range(0, width, CHUNK):
            g, s, _e = literal_row(
                X, Y, part, c, inverse, positive, slot, blocks, splits, i, in_i, d0, width,
                LITERAL, CHUNK,
            )  # fmt: skip
            along += tl.sum(g * s, 1)
    rho = tl.zeros([LITERAL], tl.float32)
    for d0 in range(0, width, CHUNK):
        g, s, e = literal_row(
            X, Y, part, c, inverse, positive, slot, blocks, splits, i, in_i, d0, width,
            LITERAL, CHUNK,
        )  # fmt: skip
        ds = (g - along[:, None] * s) * inverse[:, None]
        rho += tl.sum(ds * e, 1)
        d = d0 + tl.arange(0, CHUNK)
        inside = in_i[:, None] & (d < width)[None, :]
        row = i.to(tl.int64)[:, None] * width + d[None, :]
        if dX is not None:
            old = tl.load(dX + row, mask=inside, other=0.0)
            tl.store(dX + row, old + (1.0 - c)[:, None] * ds, mask=inside)
        if dY is not None:
            old = tl.load(dY + row, mask=inside, other=0.0)
            tl.store(dY + row, old + c[:, None] * ds + positive[:, None] * s, mask=inside)
    at = sums + RHO_LITERAL * N + i
    tl.store(at, rho + tl.load(at, mask=in_i, other=0.0), mask=in_i)


@triton.jit(
    do_not_specialize=["N", "split"], do_not_specialize_on_alignment=["scale", "bias", "ids"]
)
def literal_columns(
    X, Y, state, ids, scale, bias, index, count,
    factors,  # None: sweep 1
    running,  # sweep 1, `shared`: OTHER_ROWS, where the literal support vectors are negatives
    dY,  # sweep 2: (N, width) float32
    N, width, split,
    DIRECTION: tl.constexpr, MODE: tl.constexpr, INFONCE: tl.constexpr,
    LITERAL: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What BLOCK_J compared rows get from all literal rows: their (m, l), or dY_j += sum_i H_ij
    s_i."""
    total = tl.load(count)
    if total == 0:
        return
    k2 = logit_scale_2(scale)
    b = logit_bias_2(bias, INFONCE)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    in_j = j < N
    d0 = tl.program_id(1) * CHUNK
    d = d0 + tl.arange(0, CHUNK)
    inside = in_j[:, None] & (d < width)[None, :]
    row = j.to(tl.int64)[:, None] * width + d[None, :]
    if factors is None:
        at = running + 2 * OTHER_ROWS * N + j
        m, l = tl.load(at, mask=in_j, other=0.0), tl.load(at + N, mask=in_j, other=0.0)
    else:
        dy = tl.load(dY + row, mask=inside, other=0.0)
    for n0 in range(0, total, LITERAL):
        n = n0 + tl.arange(0, LITERAL)
        in_i = n < total
        i = tl.load(index + n, mask=in_i, other=0)
        c, inverse = literal_row_scalars(state, i, in_i, N, DIRECTION)
        product = literal_products(X, Y, c, i, j, in_i, in_j, width, LITERAL, BLOCK_J, BLOCK_D)
        product *= inverse[:, None]
        if factors is None:
            z = tl.where(literal_negatives(i, j, in_i, in_j, ids, split), k2 * product, HIDDEN)
            m_new, l_new = log_sum(z, 0, INFONCE)
            m, l = merge_pair(m, l, m_new, l_new, INFONCE)
        else:
            h = literal_slopes(
                product, factors, b, k2, i, j, in_i, in_j, ids, N, split, DIRECTION, MODE, INFONCE
            )
            x = load_rows(X, i, in_i, d0, width, CHUNK)
            s = x + c[:, None] * (load_rows(Y, i, in_i, d0, width, CHUNK) - x)
            h *= inverse[:, None]
            dy = tl.dot(h.T, s, dy, input_precision="ieee")  # [J, LITERAL] @ [LITERAL, CHUNK]
    if factors is None:
        tl.store(at, m, mask=in_j)
        tl.store(at + N, l, mask=in_j)
    else:
        tl.store(dY + row, dy, mask=inside)
