"""What every Triton kernel does with one tile of logits, as functions on registers.

A tile pairs rows I with rows J. Its logits are those of S = T_I A_J^T, P = A_I T_J^T (P_ij is
S_ji), Q = A_I A_J^T and K = T_I T_J^T, in base 2: z = k log2(e) <x, y>, so that every exponential
is one exp2. Pairs that do not take part are HIDDEN in all four, and S + c (Q - S) is HIDDEN then.

A tile on the diagonal of the Gram matrix (DIAGONAL) holds (i, j) and (j, i) of every pair; there
only what belongs to its rows is taken. Elsewhere one visit serves rows and columns: exchanging S
with P and I with J turns what is done for one into what is done for the other.
"""

import os

import triton
import triton.language as tl

from ... import options
from .. import state

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(state.HIDDEN)

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""The interpreter multiplies and rounds only float32 correctly."""

# The layout of backends/state.py; products in `sums` are in the units of the logits.
TEXT_ROWS, AUDIO_ROWS = tl.constexpr(state.TEXT_ROWS), tl.constexpr(state.AUDIO_ROWS)
SUPPORT_ROWS, OTHER_ROWS = tl.constexpr(state.SUPPORT_ROWS), tl.constexpr(state.OTHER_ROWS)
SIMILARITY = tl.constexpr(state.SIMILARITY)
STATE_GEOMETRY = tl.constexpr(state.STATE_GEOMETRY)
C = tl.constexpr(state.C)
TILE_C, OFFSET = tl.constexpr(state.TILE_C), tl.constexpr(state.OFFSET)
TEXT_INVERSE, AUDIO_INVERSE = tl.constexpr(state.TEXT_INVERSE), tl.constexpr(state.AUDIO_INVERSE)
PANEL_POSITIVE = tl.constexpr(state.PANEL_POSITIVE)
BASE, BIAS = tl.constexpr(state.BASE), tl.constexpr(state.BIAS)
RHO_TEXT, RHO_AUDIO = tl.constexpr(state.RHO_TEXT), tl.constexpr(state.RHO_AUDIO)
RHO_LITERAL = tl.constexpr(state.RHO_LITERAL)
SUPPORT_TEXT, SUPPORT_AUDIO = tl.constexpr(state.SUPPORT_TEXT), tl.constexpr(state.SUPPORT_AUDIO)
PLAIN, ONE_SIDED = tl.constexpr(options.PLAIN), tl.constexpr(options.ONE_SIDED)
SHARED, MIRROR = tl.constexpr(options.SHARED), tl.constexpr(options.MIRROR)


def launch(kernel, grid, *arguments, **constants):
    """kernel[grid](...), but for meta tensors (footprint.py): nothing."""
    if not arguments[0].is_meta:
        kernel[grid](*arguments, **constants)


@triton.jit
def vector(X, row, index, mask, N, AXIS: tl.constexpr, outside=0.0):
    """X[row, index] of X (., N), as a column (AXIS 1) or a row (AXIS 0) beside a tile."""
    return tl.expand_dims(tl.load(X + row * N + index, mask=mask, other=outside), AXIS)


@triton.jit
def support_rows(rows, INVERSE: tl.constexpr, index, mask, N, AXIS: tl.constexpr):
    """c, 1 / |s| and offset of the rows' support vectors. Outside the length is 1: what is hidden
    stays hidden when it is multiplied by it."""
    c = vector(rows, TILE_C, index, mask, N, AXIS)
    inverse = vector(rows, INVERSE, index, mask, N, AXIS, 1.0)
    return c, inverse, vector(rows, OFFSET, index, mask, N, AXIS)


@triton.jit
def support_logit(cross, gram, c, inverse, offset):
    """Of the support vector s = x + c (y_own - x): <s, y> / |s|, or HIDDEN for skipped rows."""
    return (cross + c * (gram - cross)) * inverse + offset


@triton.jit
def log1p_unit(y):
    """log(1 + y) for 0 <= y <= 1, as 2 artanh(y / (2 + y)): exact to rounding where y is tiny."""
    s = y / (2.0 + y)
    s2 = s * s
    p = s2 * (2.0 / 15.0) + 2.0 / 13.0
    p = p * s2 + 2.0 / 11.0
    p = p * s2 + 2.0 / 9.0
    p = p * s2 + 2.0 / 7.0
    p = p * s2 + 2.0 / 5.0
    p = p * s2 + 2.0 / 3.0
    p = p * s2 + 2.0
    return s * p


@triton.jit
def logit_scale_2(scale):
    """k log2(e); not 0, since sums of slope times logit are divided by it later."""
    k2 = tl.load(scale).to(tl.float32) * LOG2E
    return tl.where(k2 == 0.0, 1e-30, k2)


@triton.jit
def logit_bias_2(bias, INFONCE: tl.constexpr):
    """b log2(e); InfoNCE has none."""
    return 0.0 if INFONCE else tl.load(bias).to(tl.float32) * LOG2E


@triton.jit
def softplus(z):
    """log(1 + exp) of a logit in base 2, in nats."""
    return tl.maximum(z, 0.0) / LOG2E + log1p_unit(tl.exp2(-tl.abs(z)))


@triton.jit
def sigmoid(z):
    """Of a logit in base 2: never overflows."""
    e = tl.exp2(-tl.abs(z))
    return tl.where(z >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def log_sum(z, AXIS: tl.constexpr, INFONCE: tl.constexpr):
    """(m, l) of the logits z along AXIS.

    InfoNCE: l = sum of exp2(z - m). SigLIP: l = sum of softplus, in nats.
    """
    m = tl.max(z, AXIS)
    if INFONCE:
        l = tl.sum(tl.exp2(z - tl.expand_dims(m, AXIS)), AXIS)
    else:
        l = tl.sum(softplus(z), AXIS)
    return m, l


@triton.jit
def reduce_direction(z, out, at, plane, mask, AXIS: tl.constexpr, INFONCE: tl.constexpr):
    """out[at], out[at + plane] = m, l of the logits z along AXIS."""
    m, l = log_sum(z, AXIS, INFONCE)
    tl.store(out + at, m, mask=mask)
    tl.store(out + at + plane, l, mask=mask)


@triton.jit
def merge_pair(m, l, m_new, l_new, INFONCE: tl.constexpr):
    """(m, l) + (m_new, l_new)."""
    top = tl.maximum(m, m_new)
    if INFONCE:
        l = l * tl.exp2(m - top) + l_new * tl.exp2(m_new - top)
    else:
        l += l_new
    return top, l


@triton.jit
def negatives(i, j, in_i, in_j, ids, DIAGONAL: tl.constexpr):
    """Which pairs take part. DIAGONAL: where i may be j."""
    keep = in_i[:, None] & in_j[None, :]
    if DIAGONAL:
        keep = keep & (i[:, None] != j[None, :])
    if ids is not None:
        id_i, id_j = tl.load(ids + i, mask=in_i, other=0), tl.load(ids + j, mask=in_j, other=0)
        keep = keep & (id_i[:, None] != id_j[None, :])
    return keep


@triton.jit
def hide(S, P, Q, K, i, j, in_i, in_j, ids, DIAGONAL: tl.constexpr):
    """The four tiles without the pairs that do not take part."""
    keep = negatives(i, j, in_i, in_j, ids, DIAGONAL)
    S, P = tl.where(keep, S, HIDDEN), tl.where(keep, P, HIDDEN)
    return S, P, tl.where(keep, Q, HIDDEN), tl.where(keep, K, HIDDEN)


@triton.jit
def side_statistics(
    S, P, Q, K,  # logits; for the columns of a tile P and S are exchanged
    rows,  # (., N) float32: geometry of the rows
    b,  # logit bias in base 2
    own, other, in_own, in_other,  # indices along the kept and along the reduced axis
    out, at, plane,  # (4, 2, slots, count): m and l of the four directions, in planes
    N,
    AXIS: tl.constexpr,  # that is reduced
    MODE: tl.constexpr,
    INFONCE: tl.constexpr,
):  # fmt: skip
    """Partial (m, l) of one axis of a tile: the negatives of its texts, audios, support vectors."""
    reduce_direction(S + b, out, at, plane, in_own, AXIS, INFONCE)
    reduce_direction(P + b, out + 2 * AUDIO_ROWS * plane, at, plane, in_own, AXIS, INFONCE)
    if MODE != PLAIN:
        c, inverse, offset = support_rows(rows, TEXT_INVERSE, own, in_own, N, AXIS)
        x = support_logit(S, Q, c, inverse, offset) + b
        reduce_direction(x, out + 2 * SUPPORT_ROWS * plane, at, plane, in_own, AXIS, INFONCE)
        if MODE == MIRROR:
            c, inverse, offset = support_rows(rows, AUDIO_INVERSE, own, in_own, N, AXIS)
            y = support_logit(P, K, c, inverse, offset) + b
            reduce_direction(y, out + 2 * OTHER_ROWS * plane, at, plane, in_own, AXIS, INFONCE)
        if MODE == SHARED:
            c, inverse, offset = support_rows(rows, TEXT_INVERSE, other, in_other, N, 1 - AXIS)
            x = support_logit(P, Q, c, inverse, offset) + b
            reduce_direction(x, out + 2 * OTHER_ROWS * plane, at, plane, in_own, AXIS, INFONCE)


@triton.jit
def tile_statistics(
    S, P, Q, K, rows, b,
    i, j, in_i, in_j,
    part_i, at_i, plane_i,  # of the tile's rows, as in `side_statistics`
    part_j, at_j, plane_j,  # of its columns; not written on the diagonal
    N,
    DIAGONAL: tl.constexpr, MODE: tl.constexpr, INFONCE: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Partial (m, l) of the negatives of every direction; STATS: and what SIMILARITY gathers."""
    side_statistics(
        S, P, Q, K, rows, b, i, j, in_i, in_j, part_i, at_i, plane_i, N, 1, MODE, INFONCE
    )
    if not DIAGONAL:
        side_statistics(
            P, S, Q, K, rows, b, j, i, in_j, in_i, part_j, at_j, plane_j, N, 0, MODE, INFONCE
        )
    if STATS:
        hidden = S <= 0.5 * HIDDEN  # NaN is not
        both = tl.where(hidden, 0.0, S)
        pairs = tl.where(hidden, 0.0, 1.0)
        if not DIAGONAL:
            both, pairs = both + tl.where(hidden, 0.0, P), 2.0 * pairs
        at = part_i + 2 * SIMILARITY * plane_i + at_i
        tl.store(at, tl.sum(both, 1), mask=in_i)
        tl.store(at + plane_i, tl.sum(pairs, 1), mask=in_i)


@triton.jit
def store_positives(S, rows, b, i, j, in_i, N):
    """The logits of the positives as this product gave them: what the ranks are compared with."""
    own = i[:, None] == j[None, :]
    z = tl.sum(tl.where(own, S, 0.0), 1) + b
    inside = in_i & (tl.max(own.to(tl.int32), 1) == 1)
    tl.store(rows + PANEL_POSITIVE * N + i, z, mask=inside)


@triton.jit
def slope(z, factors, direction, index, mask, N, AXIS: tl.constexpr, INFONCE: tl.constexpr):
    """Gradient towards the logits z of the direction's rows `index`: softmax or sigmoid, weighted.

    factors (8, N): m of the four directions, then weight / l (SigLIP: weight).
    """
    f = vector(factors, 4 + direction, index, mask, N, AXIS)
    if INFONCE:
        p = tl.exp2(z - vector(factors, direction, index, mask, N, AXIS))
    else:
        p = sigmoid(z)
    return p * f


@triton.jit
def add_sum(sums, kind, plane, at, tile, mask, AXIS: tl.constexpr):
    tl.store(sums + kind * plane + at, tl.sum(tile, AXIS), mask=mask)


@triton.jit
def support_weights(
    S, gram, W, total,  # logits; weights and slopes so far
    rows, factors, b,
    own, other, in_own, in_other,  # the rows that move, and those they are compared with
    sums, at, plane,  # RHO and SUPPORT of the rows that move, or None
    N,
    AXIS: tl.constexpr,  # 1: the rows that move are the tile's rows
    DIRECTION: tl.constexpr, INVERSE: tl.constexpr, RHO: tl.constexpr, SUPPORT: tl.constexpr,
    SHARED_TOO: tl.constexpr, INFONCE: tl.constexpr,
):  # fmt: skip
    """Adds a side's support vectors to W and total; returns them and V = c H."""
    c, inverse, offset = support_rows(rows, INVERSE, own, in_own, N, AXIS)
    x = support_logit(S, gram, c, inverse, 0.0)
    h = slope(x + offset + b, factors, DIRECTION, own, in_own, N, AXIS, INFONCE)
    if SHARED_TOO:
        h += slope(x + offset, factors, OTHER_ROWS, other, in_other, N, 1 - AXIS, INFONCE)
    if sums is not None:
        add_sum(sums, RHO, plane, at, h * (gram - S), in_own, AXIS)
        add_sum(sums, SUPPORT, plane, at, h * x, in_own, AXIS)
    total += h
    h = h * inverse
    V = c * h
    return W + (h - V), total, V


@triton.jit
def half_weights(
    S, Q, K,  # logits of texts t with audios a
    rows, factors, b,
    t, a, in_t, in_a,  # indices
    out,  # where the weights of S go, or None
    sums_t, at_t, plane_t,  # RHO_TEXT and SUPPORT_TEXT of the texts, or None
    sums_a, at_a, plane_a,  # RHO_AUDIO and SUPPORT_AUDIO of the audios, or None
    N,
    T_AXIS: tl.constexpr,  # 1: texts are the tile's rows, audios its columns; 0: the other way
    MODE: tl.constexpr, INFONCE: tl.constexpr,
):  # fmt: skip
    """Writes what is done with, so that few tiles are alive at a time. Returns V_A, V_T, and BASE
    and BIAS summed over the tile's columns."""
    A_AXIS: tl.constexpr = 1 - T_AXIS
    g = slope(S + b, factors, TEXT_ROWS, t, in_t, N, T_AXIS, INFONCE)
    if INFONCE:
        g += slope(S, factors, AUDIO_ROWS, a, in_a, N, A_AXIS, INFONCE)
    base = tl.sum(g * S, 1)
    W, total, V_A, V_T = g, g, g, g
    if MODE != PLAIN:
        W, total, V_A = support_weights(
            S, Q, W, total, rows, factors, b, t, a, in_t, in_a, sums_t, at_t, plane_t, N, T_AXIS,
            SUPPORT_ROWS, TEXT_INVERSE, RHO_TEXT, SUPPORT_TEXT, MODE == SHARED, INFONCE,
        )  # fmt: skip
    if MODE == MIRROR:
        W, total, V_T = support_weights(
            S, K, W, total, rows, factors, b, a, t, in_a, in_t, sums_a, at_a, plane_a, N, A_AXIS,
            OTHER_ROWS, AUDIO_INVERSE, RHO_AUDIO, SUPPORT_AUDIO, False, INFONCE,
        )  # fmt: skip
    if out is not None:
        tl.store(out, W.to(out.dtype.element_ty))
    return V_A, V_T, base, tl.sum(total, 1)


@triton.jit
def tile_weights(
    S, P, Q, K, rows, factors, b,
    i, j, in_i, in_j,
    out, block,  # where the weights of S go, and from block to block
    sums_i, at_i, plane_i,  # (6, slots, ni): BASE ... SUPPORT_AUDIO of the tile's rows, in planes
    sums_j, at_j, plane_j,  # of its columns, RHO_TEXT and on; not written on the diagonal
    N,
    DIAGONAL: tl.constexpr, MODE: tl.constexpr, INFONCE: tl.constexpr,
):  # fmt: skip
    """Weights of A_J in dT_I (S's block), T_J in dA_I (P's), A_J in dA_I, T_J in dT_I; and sums."""
    columns = None if DIAGONAL else sums_j
    V_A, V_T, base, total = half_weights(
        S, Q, K, rows, factors, b, i, j, in_i, in_j, out,
        sums_i, at_i, plane_i, columns, at_j, plane_j, N, 1, MODE, INFONCE,
    )  # fmt: skip
    if not DIAGONAL:
        out += block
    if MODE != PLAIN or not DIAGONAL:
        V_A2, V_T2, base2, total2 = half_weights(
            P, Q, K, rows, factors, b, j, i, in_j, in_i, None if DIAGONAL else out,
            columns, at_j, plane_j, sums_i, at_i, plane_i, N, 0, MODE, INFONCE,
        )  # fmt: skip
        if not DIAGONAL:
            base, total = base + base2, total + total2
        if MODE != PLAIN:
            tl.store(out + block, (V_A + V_A2).to(out.dtype.element_ty))
        if MODE == MIRROR:
            tl.store(out + 2 * block, (V_T + V_T2).to(out.dtype.element_ty))
    tl.store(sums_i + BASE * plane_i + at_i, base, mask=in_i)
    tl.store(sums_i + BIAS * plane_i + at_i, total, mask=in_i)


@triton.jit
def tile_epilogue(
    S, P, Q, K,  # inner products, float32
    state, ids, scale, bias,
    i0, x, ni, j0, y, nj,  # the tile pair's first row and column, and what this tile has of them
    slot_i, slots_i, slot_j, slots_j,  # this tile's slots in the partial results of rows, columns
    part_i, part_j,  # (5, 2, slots, n) float32, or None: no statistics
    factors, out, block, sums_i, sums_j,  # as in `tile_weights`; None: no weights
    N,
    DIAGONAL: tl.constexpr, MODE: tl.constexpr, INFONCE: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """All that happens to one tile of products."""
    rows = state + STATE_GEOMETRY * N
    k2 = logit_scale_2(scale)
    b = logit_bias_2(bias, INFONCE)
    i, j, in_i, in_j = i0 + x, j0 + y, x < ni, y < nj
    S, P, Q, K = k2 * S, k2 * P, k2 * Q, k2 * K
    if DIAGONAL and STATS:
        store_positives(S, rows, b, i, j, in_i, N)
    S, P, Q, K = hide(S, P, Q, K, i, j, in_i, in_j, ids, DIAGONAL)
    at_i, plane_i = slot_i.to(tl.int64) * ni + x, slots_i.to(tl.int64) * ni
    at_j, plane_j = slot_j.to(tl.int64) * nj + y, slots_j.to(tl.int64) * nj
    if part_i is not None:
        tile_statistics(
            S, P, Q, K, rows, b, i, j, in_i, in_j, part_i, at_i, plane_i, part_j, at_j, plane_j,
            N, DIAGONAL, MODE, INFONCE, STATS,
        )  # fmt: skip
    if out is not None:
        tile_weights(
            S, P, Q, K, rows, factors, b, i, j, in_i, in_j, out, block,
            sums_i, at_i, plane_i, sums_j, at_j, plane_j, N, DIAGONAL, MODE, INFONCE,
        )  # fmt: skip
