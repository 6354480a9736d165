"""One direction of the loss against further columns, which have no row of their own.

    sweep 1   products X_I Y_J^T, then partial log-sum-exps of the rows
    sweep 2   products (or those kept), then weights W, dX_I += W Y_J and dY_J += W^T X_I

Nothing is symmetric here, so each matrix of logits costs one product, and each side that is trained
another one.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from .panel import Tiling
from .products import AUDIO, TEXT, Products, rows


class Block(NamedTuple):
    """Rows I against columns J; where its products are kept."""

    I: slice  # noqa: E741 - the symbol of the derivation
    J: slice
    offset: int

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.I.stop - self.I.start), int(self.J.stop - self.J.start)


class Epilogue(Protocol):
    """What a call does between the products: `running`, `factors` and `sums` are its own."""

    one_way_bytes: int
    """of working memory for each position of a block"""
    writes_weights: bool
    """`one_way_weights` uses `out`, and is given one beside a panel that is kept"""

    def one_way_products(self, X: Tensor, Y: Tensor) -> Products:
        """Of rows X (N, D), its TEXT, and columns Y (M, D), its AUDIO, as the calls' `operand`s."""

    def one_way_statistics(
        self, direction: int, block: Block, code: Tensor | None, panel: Tensor
    ) -> None:
        """Adds the negatives of a block of products (ni, nj) to the rows' log-sum-exps."""

    def one_way_weights(
        self, direction: int, block: Block, code: Tensor | None, panel: Tensor, out: Tensor
    ) -> Tensor:
        """The weights of Y_J in dX_I, in `out` (which may be `panel`) or elsewhere; adds to the
        rows' sums."""


class OneWay:
    """Rows X of a direction of a call against columns Y; `code` (M,): of the columns' ids."""

    def __init__(
        self, call: Epilogue, direction: int, X: Tensor, Y: Tensor, code: Tensor | None,
        tiling: Tiling, workspace: int,
    ) -> None:  # fmt: skip
        self.call, self.direction, self.code = call, direction, code
        self.products = call.one_way_products(X, Y)
        self.N, self.M = len(X), len(Y)
        self.sampled = X.is_meta  # two blocks stand for all (footprint.py)
        fits = math.isqrt(workspace // max(tiling.scratch, call.one_way_bytes))
        step = tiling.smallest  # packed rows are found in groups
        self.side = min(tiling.largest, max(step, fits // step * step))

    @property
    def elements(self) -> int:
        """Of all products together."""
        return self.N * self.M

    def blocks(self) -> Iterator[Block]:
        return itertools.islice(self.all_blocks(), 2 if self.sampled else None)

    def all_blocks(self) -> Iterator[Block]:
        offset = 0
        for i in range(0, self.N, self.side):
            I = slice(i, min(i + self.side, self.N))
            for j in range(0, self.M, self.side):
                block = Block(I, slice(j, min(j + self.side, self.M)), offset)
                offset += math.prod(block.shape)
                yield block

    def scratch(self, like: Tensor) -> Tensor:
        return like.new_empty(min(self.side, self.N) * min(self.side, self.M))

    def panel(self, block: Block, whole: Tensor, kept: bool) -> Tensor:
        """(ni, nj): the block's place in what is kept, or at the start of the scratch."""
        start = block.offset if kept else 0
        return whole[start : start + math.prod(block.shape)].view(block.shape)

    def code_of(self, block: Block) -> Tensor | None:
        return None if self.code is None else self.code[block.J]

    def statistics(self, kept: Tensor | None, like: Tensor) -> None:
        """Sweep 1; fills `kept` (elements,), if it is given. `like`: of the products' dtype."""
        whole = self.scratch(like) if kept is None else kept
        for block in self.blocks():
            panel = self.panel(block, whole, kept is not None)
            self.multiply(block, panel)
            self.call.one_way_statistics(self.direction, block, self.code_of(block), panel)

    def multiply(self, block: Block, panel: Tensor) -> None:
        self.products.logits(TEXT, block.I, AUDIO, block.J, panel)

    def gradients(
        self,
        dX: Tensor | None,
        dY: Tensor | None,
        kept: Tensor | None,
        like: Tensor,
        direction: int,
    ) -> None:
        """Sweep 2, into dX (N, .) and dY (M, .), or neither, with the weights of a direction. Kept
        products are only read."""
        beside = kept is None or self.call.writes_weights
        scratch = self.scratch(like) if beside else like
        for block in self.blocks():
            out = self.panel(block, scratch, kept=False) if beside else like
            panel = out if kept is None else self.panel(block, kept, kept=True)
            if kept is None:
                self.multiply(block, panel)
            code = self.code_of(block)
            W = self.call.one_way_weights(direction, block, code, panel, out)
            if dX is not None:
                self.products.accumulate(rows(dX, block.I), W, AUDIO, block.J)
            if dY is not None:
                self.products.accumulate(rows(dY, block.J), W.t(), TEXT, block.I)
