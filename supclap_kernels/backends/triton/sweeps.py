"""Triton tile kernels of both sweeps: nothing N x N in memory but the weights of one tile pair.

    S = T_I A_J^T    P = A_I T_J^T    Q = A_I A_J^T    K = T_I T_J^T        as the mode needs them

One program multiplies BLOCK_I x BLOCK_J of each, over D, and works on them where they are, in
registers. Sweep 1 (`tile_forward`) reduces them: its traffic is the rows of T and A, and 8 bytes of
partial results for each row, direction and block of columns. Sweep 2 (`tile_backward`) turns them
into the weights of the gradient's products, in a bounded panel that the library multiplies with
rows of T and A, since the accumulators of the gradient, BLOCK x D float32, do not fit beside a
tile: 2 bytes written (float32: 4) for each position and block. A sweep costs 2 + grams units of 2
N^2 D flop on a diagonal tile, and half of that for each position elsewhere, since a visit of (I, J)
serves (J, I) as well.
"""

import triton
import triton.language as tl

from .tile import INTERPRETED, MIRROR, PLAIN, tile_epilogue


@triton.jit
def load_operand(rows, d0, BLOCK_D: tl.constexpr):
    tile = tl.load(rows + (d0 + tl.arange(0, BLOCK_D))[None, :])
    if INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def tile_products(
    T, A,  # (N, width) operands, width a multiple of BLOCK_D
    x, y,  # rows and columns of the batch; those beyond N repeat the last, and are hidden later
    N, width,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S, P, Q and K of one tile, float32; S stands for those that the mode has not."""
    row_i = tl.minimum(x, N - 1).to(tl.int64)[:, None] * width
    row_j = tl.minimum(y, N - 1).to(tl.int64)[:, None] * width
    S = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    P, Q, K = S, S, S
    for d0 in range(0, width, BLOCK_D):
        t_i, a_i = load_operand(T + row_i, d0, BLOCK_D), load_operand(A + row_i, d0, BLOCK_D)
        t_j, a_j = load_operand(T + row_j, d0, BLOCK_D), load_operand(A + row_j, d0, BLOCK_D)
        S = tl.dot(t_i, a_j.T, S, input_precision=PRECISION)  # [BLOCK_I, D] @ [D, BLOCK_J]
        P = tl.dot(a_i, t_j.T, P, input_precision=PRECISION)
        if MODE != PLAIN:
            Q = tl.dot(a_i, a_j.T, Q, input_precision=PRECISION)
        if MODE == MIRROR:
            K = tl.dot(t_i, t_j.T, K, input_precision=PRECISION)
    return S, P, Q, K


@triton.jit
def column_part(X, PART: tl.constexpr, PARTS: tl.constexpr):
    """Columns of part PART of PARTS (1, 2 or 4): a choice of registers, no instruction."""
    if PARTS == 1:
        return X
    else:
        halves = tl.permute(tl.reshape(X, [X.shape[0], 2, X.shape[1] // 2]), [0, 2, 1])
        left, right = tl.split(halves)
        half = left if 2 * PART < PARTS else right
        return column_part(half, PART % (PARTS // 2), PARTS // 2)


@triton.jit(
    do_not_specialize=["N", "i0", "ni", "j0", "nj"],
    do_not_specialize_on_alignment=["ids", "scale", "bias"],
)
def tile_forward(
    T, A,
    state, ids, scale, bias,
    part_i,  # (5, 2, PARTS column blocks, ni) float32: m, l of the tile's rows; SIMILARITY
    part_j,  # (5, 2, row blocks, nj) float32: m, l of its columns; not written on the diagonal
    N, width, i0, ni, j0, nj,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, DIAGONAL: tl.constexpr,
    MODE: tl.constexpr, INFONCE: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Partial (m, l) of the negatives of every direction. A tile is reduced PARTS of its columns
    at a time, which need fewer registers."""
    x = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    first = tl.program_id(1) * BLOCK_J
    S, P, Q, K = tile_products(
        T, A, i0 + x, j0 + first + tl.arange(0, BLOCK_J), N, width,
        BLOCK_I, BLOCK_J, BLOCK_D, MODE, PRECISION,
    )  # fmt: skip
    PART: tl.constexpr = BLOCK_J // PARTS
    for part in tl.static_range(PARTS):
        tile_epilogue(
            column_part(S, part, PARTS), column_part(P, part, PARTS),
            column_part(Q, part, PARTS), column_part(K, part, PARTS),
            state, ids, scale, bias, i0, x, ni, j0, first + part * PART + tl.arange(0, PART), nj,
            tl.program_id(1) * PARTS + part, tl.num_programs(1) * PARTS,
            tl.program_id(0), tl.num_programs(0),
            part_i, part_j, None, None, 0, None, None, N, DIAGONAL, MODE, INFONCE, STATS,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["N", "i0", "ni", "j0", "nj"],
    do_not_specialize_on_alignment=["ids", "scale", "bias"],
)
def tile_backward(
    T, A, state, ids, scale, bias,
    part_i, part_j,  # as in `tile_forward`, or None. SigLIP's only sweep does the work of both
    factors,  # (8, N) float32: m and weight / l of the four directions
    out,  # weights, laid out as in `panel_weights`
    sums_i,  # (6, PARTS column blocks, ni) float32: BASE ... SUPPORT_AUDIO of the tile's rows
    sums_j,  # (6, row blocks, nj) float32: of its columns, RHO_TEXT and on; not on the diagonal
    N, width, i0, ni, j0, nj, ld, block,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, DIAGONAL: tl.constexpr,
    MODE: tl.constexpr, INFONCE: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Weights of A_J in dT_I (S's block), T_J in dA_I (P's), A_J in dA_I, T_J in dT_I."""
    x = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    first = tl.program_id(1) * BLOCK_J
    S, P, Q, K = tile_products(
        T, A, i0 + x, j0 + first + tl.arange(0, BLOCK_J), N, width,
        BLOCK_I, BLOCK_J, BLOCK_D, MODE, PRECISION,
    )  # fmt: skip
    PART: tl.constexpr = BLOCK_J // PARTS
    row = out + x.to(tl.int64)[:, None] * ld
    for part in tl.static_range(PARTS):
        y = first + part * PART + tl.arange(0, PART)
        tile_epilogue(
            column_part(S, part, PARTS), column_part(P, part, PARTS),
            column_part(Q, part, PARTS), column_part(K, part, PARTS),
            state, ids, scale, bias, i0, x, ni, j0, y, nj,
            tl.program_id(1) * PARTS + part, tl.num_programs(1) * PARTS,
            tl.program_id(0), tl.num_programs(0),
            part_i, part_j, factors, row + y[None, :], block, sums_i, sums_j,
            N, DIAGONAL, MODE, INFONCE, STATS,
        )  # fmt: skip
