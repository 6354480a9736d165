"""The panel engine: walks the tile pairs of the Gram matrix [T; A] [T; A]^T between products.

A pair (I, J), J > I, holds S = T_I A_J^T, its mirrored product P = A_I T_J^T = S_JI^T and, where
the mode needs them, Q = A_I A_J^T and K = T_I T_J^T; a diagonal tile holds no P. Q and K are
symmetric, so each is multiplied out once for a pair.

    sweep 1   products, then `statistics`: partial log-sum-exps
    sweep 2   products (or the panels kept from sweep 1), then `weights`, then
              dT_I += W A_J,  dA_J += W^T T_I,  dA_I += W' T_J,  dT_J += W'^T A_I,
              dA_I += V_A A_J,  dA_J += V_A^T A_I,  dT_I += V_T T_J,  dT_J += V_T^T T_I

Cost in N x N x D products: 1 + 1/2 + (mirror) 1/2 for the logits of a sweep, 2 + 1 + (mirror) 1
for the gradient.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .products import AUDIO, TEXT, Products, rows


class Tile(NamedTuple):
    """Rows [i0, i0 + ni) against rows [j0, j0 + nj) of both embeddings; where its kept panel is.

    A block of its panel has `size` elements, in rows of `ld`, of which (ni, nj) are in use.
    """

    i0: int
    ni: int
    j0: int
    nj: int
    offset: int
    ld: int
    size: int

    @property
    def diagonal(self) -> bool:
        return self.i0 == self.j0

    @property
    def I(self) -> slice:  # noqa: E743 - the symbol of the derivation
        return slice(self.i0, self.i0 + self.ni)

    @property
    def J(self) -> slice:
        return slice(self.j0, self.j0 + self.nj)


class Tiling(NamedTuple):
    """How a backend likes its tiles."""

    largest: int
    smallest: int
    """of the sides, which are multiples of the smallest where the workspace decides"""
    pad: int
    """blocks of a panel are stored with both sides padded to a multiple of this"""
    scratch: int
    """bytes of working memory for each position of a block"""

    def padded(self, n: Any) -> Any:
        return (n + self.pad - 1) // self.pad * self.pad


class Layout(NamedTuple):
    """How the N x N problem is cut, and what is kept. `grams` is how many of Q and K exist.

    `split` > 0: only pairs of a row before it with one from it on (distributed.py). `sampled`: two
    tile pairs stand for all, to see how much memory they need (footprint.py).
    """

    N: int
    grams: int
    side: int
    tiling: Tiling
    split: int = 0
    sampled: bool = False

    @classmethod
    def choose(
        cls, N: int, grams: int, tiling: Tiling, workspace: int, split: int, sampled: bool
    ) -> "Layout":
        """Even tiles, as large as the backend likes them and the workspace holds them."""
        fits = math.isqrt(workspace // ((2 + grams) * tiling.scratch))
        side = min(tiling.largest, max(tiling.smallest, fits // tiling.smallest * tiling.smallest))
        longest = max(split, N - split)
        even = -(-longest // -(-longest // side))
        step = max(16, tiling.pad)
        return cls(N, grams, min(side, -(-even // step) * step), tiling, split, sampled)

    @property
    def off_diagonal(self) -> bool:
        """Whether there are tiles off the diagonal."""
        return self.split > 0 or self.N > self.side

    @property
    def scratch_elements(self) -> int:
        """One tile's panel."""
        side = min(self.side, self.tiling.padded(self.N))
        return (1 + self.off_diagonal + self.grams) * side * side

    @property
    def panel_elements(self) -> int:
        """All panels together."""
        *_, last = self.tiles()
        return last.offset + last.size * (1 + (not last.diagonal) + self.grams)

    def visits(self) -> Iterator[Tile]:
        """The tile pairs that a sweep visits."""
        return itertools.islice(self.tiles(), 2 if self.sampled else None)

    def tiles(self) -> Iterator[Tile]:
        offset, end = 0, self.split or self.N
        for i0 in range(0, end, self.side):
            ni = min(self.side, end - i0)
            for j0 in range(self.split or i0, self.N, self.side):
                nj = min(self.side, self.N - j0)
                ld = self.tiling.padded(nj)
                size = self.tiling.padded(ni) * ld
                yield Tile(i0, ni, j0, nj, offset, ld, size)
                offset += size * ((1 if i0 == j0 else 2) + self.grams)


PLACEHOLDER = 2
"""Length of an empty `saved`: torch.compile treats sizes 0 and 1 apart and would compile twice."""


def kept_elements(N: Any, grams: int, itemsize: int, tiling: Tiling, workspace: int) -> Any:
    """Size of the panels that sweep 1 keeps for sweep 2: all of them, or PLACEHOLDER if too large.

    Written without a branch on N (an upper bound: N^2 for S, half of N^2 and the diagonal tiles for
    each of Q and K), so that torch.compile compiles once for every N.
    """
    N = tiling.padded(N)
    side = torch.sym_min(N, tiling.largest)
    elements = N * N + grams * (N * N + N * side) // 2
    # Sweep 2 works beside what is kept.
    needed = elements * itemsize + (2 + grams) * side * side * tiling.scratch
    return elements * torch.sym_min(1, workspace // needed) + PLACEHOLDER


def kept_panels(saved: Tensor) -> Tensor | None:
    """The panels in what forward saved, or None."""
    return saved if saved.numel() > PLACEHOLDER else None


class Epilogue(Protocol):
    """What a backend provides between the products."""

    def hide_pairs(self, tile: Tile, panel: Tensor) -> None:
        """Take the pairs that do not take part (the diagonal, equal ids) out of the logits."""

    def statistics(self, tile: Tile, panel: Tensor) -> None:
        """Add one tile's negatives to the log-sum-exps of its rows and columns."""

    def weights(self, tile: Tile, panel: Tensor, out: Tensor) -> None:
        """Turn logits into the weights of the gradient's products; `out` may be `panel`."""


class Blocks(NamedTuple):
    """The blocks of one panel as (ni, nj) views."""

    S: Tensor
    P: Tensor | None
    Q: Tensor | None
    K: Tensor | None


def blocks(tile: Tile, grams: int, panel: Tensor) -> Blocks:
    """Views of the blocks at the start of `panel`."""
    shape, strides = (tile.ni, tile.nj), (tile.ld, 1)
    begin = int(panel.storage_offset())
    count = 2 - tile.diagonal + grams
    views = [panel.as_strided(shape, strides, begin + n * tile.size) for n in range(count)]
    return Blocks(
        views.pop(0),
        None if tile.diagonal else views.pop(0),
        views.pop(0) if grams > 0 else None,
        views.pop(0) if grams > 1 else None,
    )


def multiply_tile(tile: Tile, grams: int, panel: Tensor, products: Products) -> None:
    """The inner products of one tile, into its panel."""
    out = blocks(tile, grams, panel)
    I, J = tile.I, tile.J
    products.logits(TEXT, I, AUDIO, J, out.S)
    if out.P is not None:
        products.logits(AUDIO, I, TEXT, J, out.P)
    if out.Q is not None:
        products.logits(AUDIO, I, AUDIO, J, out.Q)
    if out.K is not None:
        products.logits(TEXT, I, TEXT, J, out.K)


def panel_of(tile: Tile, kept: Tensor | None, scratch: Tensor | None) -> Tensor:
    """Where a tile's logits are: its place in what is kept, or the one scratch panel."""
    if kept is not None:
        return rows(kept, slice(tile.offset, kept.shape[0]))
    assert scratch is not None
    return scratch


def sweep_statistics(
    layout: Layout,
    products: Products,
    epilogue: Epilogue,
    kept: Tensor | None,
    scratch: Tensor | None,
) -> None:
    """Sweep 1: fills `kept` with every tile's logits; or, where it is None, works in `scratch`."""
    for tile in layout.visits():
        panel = panel_of(tile, kept, scratch)
        multiply_tile(tile, layout.grams, panel, products)
        epilogue.hide_pairs(tile, panel)
        epilogue.statistics(tile, panel)


def sweep_gradients(
    dT: Tensor | None,
    dA: Tensor | None,
    layout: Layout,
    products: Products,
    epilogue: Epilogue,
    kept: Tensor | None,
    scratch: Tensor,
    with_statistics: bool = False,
) -> None:
    """Sweep 2. Kept logits are only read, so it may run again; `with_statistics` adds sweep 1."""
    for tile in layout.visits():
        panel = panel_of(tile, kept, scratch)
        if kept is None:
            multiply_tile(tile, layout.grams, panel, products)
            epilogue.hide_pairs(tile, panel)
        if with_statistics:
            epilogue.statistics(tile, panel)
        epilogue.weights(tile, panel, scratch)
        add_products(dT, dA, tile, blocks(tile, layout.grams, scratch), products)


def add_products(
    dT: Tensor | None, dA: Tensor | None, tile: Tile, weight: Blocks, products: Products
) -> None:
    """The gradient's products of one tile; a frozen side (None) costs nothing."""
    I, J = tile.I, tile.J
    W, W_P, V_A, V_T = weight
    if dT is not None:
        products.accumulate(rows(dT, I), W, AUDIO, J)
        if W_P is not None:
            products.accumulate(rows(dT, J), W_P.t(), AUDIO, I)
        if V_T is not None:
            products.accumulate(rows(dT, I), V_T, TEXT, J)
            if not tile.diagonal:
                products.accumulate(rows(dT, J), V_T.t(), TEXT, I)
    if dA is not None:
        products.accumulate(rows(dA, J), W.t(), TEXT, I)
        if W_P is not None:
            products.accumulate(rows(dA, I), W_P, TEXT, J)
        if V_A is not None:
            products.accumulate(rows(dA, I), V_A, AUDIO, J)
            if not tile.diagonal:
                products.accumulate(rows(dA, J), V_A.t(), AUDIO, I)
