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

from .tile import MIRROR, PLAIN, tile_epilogue


@triton.jit
def load_panel(
    panel, ld, block,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, DIAGONAL: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Products of this program's tile, and where it is: rows x, columns y of the panel."""
    x = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    y = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    at = x.to(tl.int64)[:, None] * ld + y[None, :]
    S = tl.load(panel + at)
    if DIAGONAL:
        mirrored = y.to(tl.int64)[:, None] * ld + x[None, :]  # S is square here: P = S^T
        P = tl.load(panel + mirrored).T
    else:
        panel += block
        P = tl.load(panel + at)
    Q, K = S, S
    if MODE != PLAIN:
        Q = tl.load(panel + block + at)
    if MODE == MIRROR:
        K = tl.load(panel + 2 * block + at)
    return S, P, Q, K, x, y


@triton.jit(
    do_not_specialize=["N", "i0", "ni", "j0", "nj"],
    do_not_specialize_on_alignment=["ids", "scale", "bias"],
)
def panel_statistics(
    panel,  # float32
    state,  # (22, N) float32: geometry of the rows
    ids,  # (N,) int64 or None
    scale, bias,  # () logit scale and bias, on the device; bias None for InfoNCE
    part_i,  # (5, 2, column blocks, ni) float32: m, l of the tile's rows; SIMILARITY
    part_j,  # (5, 2, row blocks, nj) float32: m, l of its columns; not written on the diagonal
    N, i0, ni, j0, nj, ld, block,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, DIAGONAL: tl.constexpr,
    MODE: tl.constexpr, INFONCE: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Sweep 1: partial (m, l) of the negatives of every direction."""
    S, P, Q, K, x, y = load_panel(panel, ld, block, BLOCK_I, BLOCK_J, DIAGONAL, MODE)
    tile_epilogue(
        S, P, Q, K, state, ids, scale, bias, i0, x, ni, j0, y, nj,
        tl.program_id(1), tl.num_programs(1), tl.program_id(0), tl.num_programs(0),
        part_i, part_j, None, None, block, None, None, N, DIAGONAL, MODE, INFONCE, STATS,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["N", "i0", "ni", "j0", "nj"],
    do_not_specialize_on_alignment=["ids", "scale", "bias"],
)
def panel_weights(
    panel, state, ids, scale, bias,  # as in `panel_statistics`
    part_i, part_j,  # ... or None. Without a normaliser (SigLIP) one sweep does the work of both
    factors,  # (8, N) float32: m and weight / l of the four directions
    out,  # weights, laid out like the panel; any float dtype; may not share memory with it
    sums_i,  # (6, column blocks, ni) float32: BASE ... SUPPORT_AUDIO of the tile's rows
    sums_j,  # (6, row blocks, nj) float32: of its columns, RHO_TEXT and on; not on the diagonal
    N, i0, ni, j0, nj, ld, block,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, DIAGONAL: tl.constexpr,
    MODE: tl.constexpr, INFONCE: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Sweep 2: weights of A_J in dT_I (S's block), T_J in dA_I (P's), A_J in dA_I, T_J in dT_I."""
    S, P, Q, K, x, y = load_panel(panel, ld, block, BLOCK_I, BLOCK_J, DIAGONAL, MODE)
    tile_epilogue(
        S, P, Q, K, state, ids, scale, bias, i0, x, ni, j0, y, nj,
        tl.program_id(1), tl.num_programs(1), tl.program_id(0), tl.num_programs(0),
        part_i, part_j, factors, out + x.to(tl.int64)[:, None] * ld + y[None, :], block,
        sums_i, sums_j, N, DIAGONAL, MODE, INFONCE, STATS,
    )  # fmt: skip
