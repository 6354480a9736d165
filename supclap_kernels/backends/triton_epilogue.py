"""Triton epilogues of the panel engine: the work between two library products.

A panel holds the inner products of one tile pair, float32, block after block: S, P (off the
diagonal of the Gram matrix), Q and K (where the mode has them). A block has ld columns, of which nj
are in use, and block / ld rows, of which ni are; both are multiples of BLOCK_J, so that no access
needs a mask, which would break up its 16 bytes. What the padding holds does not matter, NaN
included. Each epilogue reads a panel once, 4 bytes a position and block; `panel_weights` writes as
many weights besides.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    BASE,
    BIAS,
    LOG2E,
    MIRROR,
    NONE,
    RHO_AUDIO,
    RHO_TEXT,
    SUPPORT_AUDIO,
    SUPPORT_TEXT,
    half_weights,
    hide,
    side_statistics,
)


@triton.jit
def load_panel(
    panel, ids, scale, i0, ni, j0, nj, ld, block,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, DIAGONAL: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of this program's tile, and where it is: rows x, columns y of the panel."""
    x = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    y = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    in_i, in_j = x < ni, y < nj
    at = x.to(tl.int64)[:, None] * ld + y[None, :]
    k2 = tl.load(scale).to(tl.float32) * LOG2E
    k2 = tl.where(k2 == 0.0, 1e-30, k2)  # sums of slope times logit are divided by k2 later
    S = tl.load(panel + at) * k2
    if DIAGONAL:
        mirrored = y.to(tl.int64)[:, None] * ld + x[None, :]  # S is square here: P = S^T
        P = tl.load(panel + mirrored).T * k2
    else:
        panel += block
        P = tl.load(panel + at) * k2
    Q, K = S, S
    if MODE != NONE:
        Q = tl.load(panel + block + at) * k2
    if MODE == MIRROR:
        K = tl.load(panel + 2 * block + at) * k2
    S, P, Q, K = hide(S, P, Q, K, i0 + x, j0 + y, in_i, in_j, ids, DIAGONAL)
    return S, P, Q, K, x, y, in_i, in_j


@triton.jit(do_not_specialize=["i0", "ni", "j0", "nj"])
def panel_statistics(
    panel,  # float32
    rows,  # (., N) float32
    ids,  # (N,) int64 or None
    scale, bias,  # () logit scale and bias, on the device
    part_i,  # (4, 2, column blocks, ni) float32: m, l of the tile's rows
    part_j,  # (4, 2, row blocks, nj) float32: m, l of its columns; not written on the diagonal
    N, i0, ni, j0, nj, ld, block,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, DIAGONAL: tl.constexpr,
    MODE: tl.constexpr, INFONCE: tl.constexpr,
):  # fmt: skip
    """Sweep 1: partial (m, l) of the negatives of every direction."""
    S, P, Q, K, x, y, in_i, in_j = load_panel(
        panel, ids, scale, i0, ni, j0, nj, ld, block, BLOCK_I, BLOCK_J, DIAGONAL, MODE
    )
    b = 0.0 if INFONCE else tl.load(bias).to(tl.float32) * LOG2E
    i, j = i0 + x, j0 + y
    plane_i = tl.num_programs(1).to(tl.int64) * ni
    at_i = tl.program_id(1).to(tl.int64) * ni + x
    side_statistics(
        S, P, Q, K, rows, b, i, j, in_i, in_j, part_i, at_i, plane_i, N, 1, MODE, INFONCE
    )
    if not DIAGONAL:
        plane_j = tl.num_programs(0).to(tl.int64) * nj
        at_j = tl.program_id(0).to(tl.int64) * nj + y
        side_statistics(
            P, S, Q, K, rows, b, j, i, in_j, in_i, part_j, at_j, plane_j, N, 0, MODE, INFONCE
        )


@triton.jit
def add_sum(sums, kind, plane, at, tile, mask, AXIS: tl.constexpr):
    tl.store(sums + kind * plane + at, tl.sum(tile, AXIS), mask=mask)


@triton.jit(do_not_specialize=["i0", "ni", "j0", "nj"])
def panel_weights(
    panel, rows, ids, scale, bias,  # as in `panel_statistics`
    factors,  # (8, N) float32: m and weight / l of the four directions
    out,  # weights, laid out like the panel; any float dtype; may not share memory with it
    sums_i,  # (6, column blocks, ni) float32: BASE ... SUPPORT_AUDIO of the tile's rows
    sums_j,  # (6, row blocks, nj) float32: of its columns, RHO_TEXT and on; not on the diagonal
    N, i0, ni, j0, nj, ld, block,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, DIAGONAL: tl.constexpr,
    MODE: tl.constexpr, INFONCE: tl.constexpr,
):  # fmt: skip
    """Sweep 2: weights of A_J in dT_I (S's block), T_J in dA_I (P's), A_J in dA_I, T_J in dT_I."""
    S, P, Q, K, x, y, in_i, in_j = load_panel(
        panel, ids, scale, i0, ni, j0, nj, ld, block, BLOCK_I, BLOCK_J, DIAGONAL, MODE
    )
    b = 0.0 if INFONCE else tl.load(bias).to(tl.float32) * LOG2E
    i, j = i0 + x, j0 + y
    W, V_A, V_T, base, total, rho_t, rho_a, support_t, support_a = half_weights(
        S, Q, K, rows, factors, b, i, j, in_i, in_j, N, 1, MODE, INFONCE
    )
    X, V_A2, V_T2, base2, total2, rho_t2, rho_a2, support_t2, support_a2 = half_weights(
        P, Q, K, rows, factors, b, j, i, in_j, in_i, N, 0, MODE, INFONCE
    )
    at = out + x.to(tl.int64)[:, None] * ld + y[None, :]
    dtype = out.dtype.element_ty
    tl.store(at, W.to(dtype))
    if not DIAGONAL:
        at += block
        tl.store(at, X.to(dtype))
        base, total = base + base2, total + total2
    if MODE != NONE:
        tl.store(at + block, (V_A + V_A2).to(dtype))
    if MODE == MIRROR:
        tl.store(at + 2 * block, (V_T + V_T2).to(dtype))

    plane = tl.num_programs(1).to(tl.int64) * ni
    at_i = tl.program_id(1).to(tl.int64) * ni + x
    add_sum(sums_i, BASE, plane, at_i, base, in_i, 1)
    add_sum(sums_i, BIAS, plane, at_i, total, in_i, 1)
    if MODE != NONE:
        add_sum(sums_i, RHO_TEXT, plane, at_i, rho_t, in_i, 1)
        add_sum(sums_i, SUPPORT_TEXT, plane, at_i, support_t, in_i, 1)
    if MODE == MIRROR:
        add_sum(sums_i, RHO_AUDIO, plane, at_i, rho_a2, in_i, 1)
        add_sum(sums_i, SUPPORT_AUDIO, plane, at_i, support_a2, in_i, 1)
    if not DIAGONAL:
        plane = tl.num_programs(0).to(tl.int64) * nj
        at_j = tl.program_id(0).to(tl.int64) * nj + y
        if MODE != NONE:
            add_sum(sums_j, RHO_TEXT, plane, at_j, rho_t2, in_j, 0)
            add_sum(sums_j, SUPPORT_TEXT, plane, at_j, support_t2, in_j, 0)
        if MODE == MIRROR:
            add_sum(sums_j, RHO_AUDIO, plane, at_j, rho_a, in_j, 0)
            add_sum(sums_j, SUPPORT_AUDIO, plane, at_j, support_a, in_j, 0)


@triton.jit(do_not_specialize=["slots", "count", "first", "N", "used"])
def merge_statistics(
    part,  # (4, 2, slots, count) float32: partial m, l
    running,  # (8, N) float32: m, then l of the four directions; updated at first .. first + count
    slots, count, first, N,
    used,  # bit d: direction d has partials
    INFONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one tile's partial log-sum-exps (SigLIP: sums) to the running ones, in slot order.

    The grid is (count / BLOCK, 4): one program owns its rows of a direction.
    """
    direction = tl.program_id(1)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (x < count) & ((used >> direction) % 2 == 1)
    at = running + direction.to(tl.int64) * N + first + x
    m, l = tl.load(at, mask=inside, other=0.0), tl.load(at + 4 * N, mask=inside, other=0.0)
    plane = slots.to(tl.int64) * count
    slot = part + 2 * direction * plane + x
    for _ in range(0, slots):
        m_new = tl.load(slot, mask=inside, other=0.0)
        l_new = tl.load(slot + plane, mask=inside, other=0.0)
        top = tl.maximum(m, m_new)
        if INFONCE:
            l = l * tl.exp2(m - top) + l_new * tl.exp2(m_new - top)
        else:
            l += l_new
        m = top
        slot += count
    tl.store(at, m, mask=inside)
    tl.store(at + 4 * N, l, mask=inside)
