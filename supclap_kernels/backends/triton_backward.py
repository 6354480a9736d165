"""Triton tile kernel of sweep 2: products, and the weights of the gradient's products.

The products of `tile_forward`, then the weights of one tile pair into a bounded panel, which the
library multiplies with rows of T and A: the accumulators of the gradient, BLOCK x D float32, do not
fit beside a tile. 2 bytes written (float32: 4) for each position and block.
"""

import triton
import triton.language as tl

from .triton_forward import column_part, tile_products
from .triton_tiles import tile_epilogue


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
