"""Launches the kernels of literal.py, without asking the device how many literal rows there
are."""

from typing import Any

import torch
import triton
from torch import Tensor

from .. import tile_sizes
from . import literal as kernels
from .tile import MIRROR, OTHER_ROWS, SHARED, SUPPORT_ROWS, launch

LITERAL, BLOCK_J, CHUNK = (
    tile_sizes.LITERAL_ROWS,
    tile_sizes.LITERAL_COLUMNS,
    tile_sizes.LITERAL_CHUNK,
)
BLOCK_D, ROW_CHUNK = tile_sizes.LITERAL_DEPTH, tile_sizes.OPERAND_COLUMNS


class LiteralRows:
    """The literal rows of one call. `fixed` are (state, ids, scale, bias) of every kernel."""

    def __init__(
        self,
        T: Tensor,
        A: Tensor,
        fixed: tuple[Tensor | None, ...],
        mode: int,
        infonce: bool,
        split: int,
    ) -> None:
        self.N, self.width = N, width = T.shape
        self.split = split
        self.mode, self.infonce, self.fixed = mode, infonce, fixed
        assert fixed[0] is not None
        self.state: Tensor = fixed[0]
        # (direction of the softmax, rows that move, rows they are compared with)
        self.sides = [(SUPPORT_ROWS.value, T, A)]
        if mode == MIRROR.value:
            self.sides.append((OTHER_ROWS.value, A, T))
        self.index = torch.empty(N, dtype=torch.int32, device=T.device)
        self.count = torch.empty((), dtype=torch.int32, device=T.device)
        launch(
            kernels.list_literal,
            (1,),
            self.state,
            self.index,
            self.count,
            N,
            BLOCK=1024,
            num_warps=4,
        )
        self.blocks = triton.cdiv(N, LITERAL)
        self.max_splits = triton.cdiv(N, tile_sizes.LITERAL_SPLIT)
        self.chunks = triton.cdiv(width, CHUNK)

    def rows(
        self, factors: Tensor | None, running: Tensor | None = None, sums: Tensor | None = None
    ) -> None:
        """The statistics of the literal rows into `running`, or, with factors, their sums to
        `sums`."""
        part = self.state.new_empty(2, self.blocks * LITERAL)
        share = (self.N, self.blocks, self.max_splits)
        for direction, X, Y in self.sides:
            launch(
                kernels.literal_rows, (self.blocks,),
                X, Y, *self.fixed, self.index, self.count, factors, part,
                self.N, self.width, self.split, self.blocks, self.max_splits,
                DIRECTION=direction, MODE=self.mode, INFONCE=self.infonce,
                LITERAL=LITERAL, BLOCK_J=BLOCK_J, BLOCK_D=BLOCK_D, num_warps=4, num_stages=2,
            )  # fmt: skip
            launch(
                kernels.merge_literal_rows, (self.blocks,),
                part, self.index, self.count, running, sums, *share,
                DIRECTION=direction, INFONCE=self.infonce, LITERAL=LITERAL, BLOCK_J=BLOCK_J,
                num_warps=1,
            )  # fmt: skip

    def columns(
        self,
        direction: int,
        X: Tensor,
        Y: Tensor,
        factors: Tensor | None,
        running: Tensor | None,
        dY: Tensor | None,
    ) -> None:
        grid = (triton.cdiv(self.N, BLOCK_J), 1 if factors is None else self.chunks)
        launch(
            kernels.literal_columns, grid,
            X, Y, *self.fixed, self.index, self.count, factors, running, dY,
            self.N, self.width, self.split,
            DIRECTION=direction, MODE=self.mode, INFONCE=self.infonce,
            LITERAL=LITERAL, BLOCK_J=BLOCK_J, BLOCK_D=BLOCK_D, CHUNK=CHUNK,
            num_warps=4, num_stages=2,
        )  # fmt: skip

    def statistics(self, running: Tensor) -> None:
        """Put the literal rows' (m, l) of the negatives into `running` (10, N)."""
        self.rows(None, running=running)
        if self.mode == SHARED.value:
            self.columns(*self.sides[0], None, running, None)

    def gradients(
        self,
        factors: Tensor,
        slopes: Tensor,
        sums: Tensor,
        dT: Tensor | None,
        dA: Tensor | None,
        renormalize: bool,
    ) -> None:
        """Add what the literal rows' products give to dT, dA (N, width; None: frozen) and `sums`.
        `slopes` (2, N) are those towards the positives' logits of the sides.

        The gradients of the support vectors themselves take LITERAL_PARTS x LITERAL rows at a time.
        """
        self.rows(factors, sums=sums)
        capacity = min(self.blocks, tile_sizes.LITERAL_PARTS)
        part = self.state.new_empty(capacity * LITERAL, self.width)
        constants: dict[str, Any] = {"LITERAL": LITERAL, "BLOCK_J": BLOCK_J, "num_warps": 4}
        for direction, X, Y in self.sides:
            dX, dY = (dT, dA) if direction == SUPPORT_ROWS.value else (dA, dT)
            for first in range(0, self.N, capacity * LITERAL):
                share = (first, capacity, self.max_splits)
                launch(
                    kernels.literal_gradient, (capacity, self.chunks),
                    X, Y, *self.fixed, self.index, self.count, factors, part,
                    self.N, self.width, self.split, *share,
                    DIRECTION=direction, MODE=self.mode, INFONCE=self.infonce,
                    BLOCK_D=BLOCK_D, CHUNK=CHUNK, num_stages=2, **constants,
                )  # fmt: skip
                launch(
                    kernels.finish_literal, (capacity,),
                    X, Y, self.state, self.index, self.count, slopes, part, sums, dX, dY,
                    self.N, self.width, *share,
                    DIRECTION=direction, RENORMALIZE=renormalize, CHUNK=ROW_CHUNK, **constants,
                )  # fmt: skip
            if dY is not None:
                self.columns(direction, X, Y, factors, None, dY)
