"""One pass of the GPU backends (device.py): the tensors on the device, and the order of the work.

What launches the kernels is a subclass of `DeviceCall`: for Triton's (triton/call.py), and for
those of csrc/cuda (cuda/sweeps.py).
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import MIRROR, PLAIN, SHARED, Options
from . import tile_sizes
from .call import Tensors, Towers
from .one_way import Block
from .panel import (
    Layout,
    Tile,
    Tiling,
    add_products,
    blocks,
    multiply_tile,
    panel_of,
)
from .products import DeviceProducts
from .state import BASE, BIAS, DIRECTIONS, HIDDEN, PLANES, ROW_SUMS, STATE_ROWS, TILE_SUMS
from .streams import in_flight

LN2 = math.log(2.0)


class Scratch(NamedTuple):
    """Working memory of one tile in flight; None for what a sweep does without."""

    panel: Tensor | None
    weights: Tensor | None
    part_i: Tensor | None
    part_j: Tensor | None
    sums_i: Tensor | None
    sums_j: Tensor | None


def contiguous(x: Tensor | None) -> Tensor | None:
    """Vectors as the kernels read them; an expanded upstream gradient is one number N times."""
    return None if x is None else x.contiguous()


class Kernels(Protocol):
    """What a family of kernels does with a call: RowCall and TritonCall of triton/, CudaCall of
    cuda/sweeps.py."""

    @staticmethod
    def weights_dtype(dtype: torch.dtype) -> torch.dtype:
        """Of stored weights, for the embeddings' dtype."""

    def prepare_launches(self) -> None:
        """Before anything is launched."""

    def slots(self, ni: int, nj: int, weights: bool) -> tuple[int, int]:
        """Of the partial results of a tile's rows, and of its columns."""

    def pack_rows(self, X: Tensor, out: Tensor) -> None:
        """out (N, width) = the rows X (N, D), normalised if asked, zero beyond D."""

    def prepare_state(self) -> None:
        """Fills `state` with the geometry of the rows, and starts `running`."""

    def launch_tile(self, tile: Tile, panel: Tensor | None, scratch: Scratch) -> None:
        """Statistics of one tile, weights, or both, as the scratch has room for."""

    def merge_tile(self, tile: Tile, scratch: Scratch) -> None:
        """Adds the tile's partial results to the running ones."""

    def literal_statistics(self) -> None:
        """Puts the literal rows' statistics into `running`."""

    def finish_rows(self, rows: Tensor, terms: Tensor | None) -> None:
        """The rows' losses (N,) and (6, N) terms, from `running`; fills `state`."""

    def prepare_factors(self, upstream: Tensor | None) -> None:
        """Fills `omega`, `factors` and `unit`."""

    def literal_gradients(self, dT: Tensor | None, dA: Tensor | None) -> None:
        """Adds what the literal rows' products give to dT, dA (N, width) and `sums`."""

    def finish_towers(
        self, dT: Tensor | None, dA: Tensor | None, text: Tensor | None, audio: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """text, audio (N, D) from dT, dA (N, width) and `sums`. Returns dR of each row (N,), and
        the sums (3,) of dk, db and dR over rows."""


class DeviceCall(Kernels):
    """Implements call.Call for tensors on a GPU; subclasses launch the Kernels."""

    unit: Any = None

    def __init__(
        self,
        inputs: Tensors,
        options: Options,
        tiling: Tiling,
        fused: bool,
        state: Tensor | None = None,
        split: int = 0,
    ) -> None:
        self.inputs = inputs._replace(
            radius=contiguous(inputs.radius),
            ids=contiguous(inputs.ids),
            weight=contiguous(inputs.weight),
        )
        self.options, self.fused, self.split = options, fused, split
        self.device, self.dtype = inputs.audio.device, inputs.audio.dtype
        self.N, self.D = N, D = inputs.audio.shape
        self.width = tile_sizes.operand_width(D)
        self.infonce, has_radius = options.infonce, inputs.radius is not None
        self.mode = options.mode(has_radius)
        self.bias = inputs.bias
        if self.bias is None and not self.infonce:
            self.bias = self.new_zeros()
        self.row_scale = 1.0 / N if options.reduction == "mean" else 1.0
        self.per_row_radius = inputs.radius is not None and inputs.radius.ndim == 1
        self.grams = options.grams(has_radius)
        self.layout = Layout.choose(
            N, self.grams, tiling, options.workspace, split, inputs.audio.is_meta
        )
        # Which directions and sums a tile adds to: bit d for its rows, and for its columns.
        svr, two = self.mode != PLAIN, self.mode in (SHARED, MIRROR)
        self.directions = 0b0011 | svr * 0b0100 | two * 0b1000
        self.sums_of_columns = svr * 0b010100 | (self.mode == MIRROR) * 0b101000
        self.stored = self.weights_dtype(self.dtype)
        self.prepare_launches()
        self.T, self.A = self.operand(inputs.text), self.operand(inputs.audio)
        self.products = DeviceProducts(self.T, self.A)
        self.state = self.new_zeros(STATE_ROWS, N) if state is None else state
        if state is None:
            self.running = self.new_empty(PLANES, N)
            self.prepare_state()

    def new_empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def new_zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def operand(self, X: Tensor) -> Tensor:
        """The rows as the products see them: contiguous, aligned, `width` columns, normalised if
        asked. The rows as given where they are like that."""
        as_given = X.is_contiguous() and self.width == self.D and X.data_ptr() % 16 == 0
        if as_given and not self.options.normalize:
            return X
        out = torch.empty(self.N, self.width, dtype=self.dtype, device=self.device)
        self.pack_rows(X, out)
        return out

    def normalized(self) -> tuple[Tensor, Tensor]:
        return self.T[:, : self.D], self.A[:, : self.D]

    # One tile.
    def lanes(self, panel: bool, statistics: bool, weights: bool) -> list[Scratch]:
        """Scratch of a sweep, for the largest tile. Two tiles are in flight where there are several
        and the library's products can hide the epilogues; the tile kernels leave nothing to hide.
        """
        side = min(self.layout.side, self.layout.tiling.padded(self.N))
        slots, size = self.slots(side, side, weights), self.layout.scratch_elements

        def scratch() -> Scratch:
            parts = [self.new_empty(PLANES, n, side) if statistics else None for n in slots]
            sums = [self.new_empty(TILE_SUMS, n, side) if weights else None for n in slots]
            return Scratch(
                self.new_empty(size) if panel and not self.fused else None,
                self.new_empty(size, dtype=self.stored) if weights else None,
                *parts,
                *sums,
            )

        return [scratch() for _ in range(1 + (self.layout.off_diagonal and not self.fused))]

    def logits(
        self, tile: Tile, kept: Tensor | None, scratch: Scratch, multiply: bool
    ) -> Tensor | None:
        """The tile's panel, multiplied out if asked; None for the tile kernels."""
        if self.fused:
            return None
        panel = panel_of(tile, kept, scratch.panel)
        if multiply:
            multiply_tile(tile, self.grams, panel, self.products)
        return panel

    # Rows against further columns: PyTorch's own operators between the products.
    one_way_bytes = 5 * 4  # products, logits, slopes, the product of both, and weights
    writes_weights = False

    def columns(self, X: Tensor) -> Tensor:
        out = torch.zeros(len(X), self.width, dtype=self.dtype, device=self.device)
        out[:, : self.D] = X
        return out

    def column_code(self, ids: Tensor | None) -> Tensor | None:
        return ids

    def one_way_products(self, X: Tensor, Y: Tensor) -> DeviceProducts:
        return DeviceProducts(X, Y)

    def one_way_logits(self, block: Block, code: Tensor | None, panel: Tensor) -> Tensor:
        """(ni, nj) in base 2, without the bias; HIDDEN where ids are equal."""
        z = panel * logit_scale_2(self.inputs.scale)
        if code is not None and self.inputs.ids is not None:
            z.masked_fill_(self.inputs.ids[block.I, None] == code[None, :], HIDDEN)
        return z

    def one_way_statistics(
        self, direction: int, block: Block, code: Tensor | None, panel: Tensor
    ) -> None:
        z = self.one_way_logits(block, code, panel)
        m, l = self.log_sums[:, direction, block.I]
        if self.infonce:
            top = torch.maximum(m, z.amax(dim=1))
            l.mul_((m - top).exp2_()).add_(z.sub_(top[:, None]).exp2_().sum(dim=1))
            m.copy_(top)
        else:
            z = z.add_(self.bias_2)
            torch.maximum(m, z.amax(dim=1), out=m)
            l.add_(F.softplus(z * LN2).sum(dim=1))

    def one_way_weights(
        self, direction: int, block: Block, code: Tensor | None, panel: Tensor, out: Tensor
    ) -> Tensor:
        z = self.one_way_logits(block, code, panel)
        m, factor = self.factors[direction, block.I], self.factors[DIRECTIONS + direction, block.I]
        if self.infonce:
            slopes = (z - m[:, None]).exp2_()
        else:
            slopes = ((z + self.bias_2) * LN2).sigmoid_()
        slopes *= factor[:, None]
        self.sums[BASE, block.I] += (slopes * z).sum(dim=1)
        self.sums[BIAS, block.I] += slopes.sum(dim=1)
        return slopes.to(self.stored)

    @property
    def bias_2(self) -> Tensor:
        """In base 2."""
        assert self.bias is not None
        return self.bias.float() / LN2

    def finish_columns(self, total: Tensor) -> Tensor:
        rows = total[:, : self.D] if total.ndim == 2 else total
        return rows * (self.inputs.scale.float() * self.unit)

    def exponential(self, x: Tensor) -> Tensor:
        return x.exp2()

    @property
    def log_sums(self) -> Tensor:
        return self.running[:8].view(4, 2, self.N).transpose(0, 1)

    # The sweeps.
    def sweep_statistics(self, kept: Tensor | None) -> None:
        def free(tile: Tile, scratch: Scratch) -> None:
            self.launch_tile(tile, self.logits(tile, kept, scratch, multiply=True), scratch)

        scratch = (kept is None, True, False)
        lanes = self.lanes(*scratch)
        in_flight(self.device, self.layout.visits(), lanes, free, self.merge_tile)
        if self.mode != PLAIN:
            self.literal_statistics()

    def sweep_gradients(
        self,
        dA: Tensor | None,
        dT: Tensor | None,
        kept: Tensor | None,
        with_statistics: bool = False,
    ) -> None:
        def free(tile: Tile, scratch: Scratch) -> None:
            panel = self.logits(tile, kept, scratch, multiply=kept is None)
            self.launch_tile(tile, panel, scratch)

        def ordered(tile: Tile, scratch: Scratch) -> None:
            self.merge_tile(tile, scratch)
            assert scratch.weights is not None
            add_products(dT, dA, tile, blocks(tile, self.grams, scratch.weights), self.products)

        scratch = (kept is None, with_statistics, True)
        in_flight(self.device, self.layout.visits(), self.lanes(*scratch), free, ordered)
        if self.mode != PLAIN:
            if with_statistics:
                self.literal_statistics()
            self.literal_gradients(dT, dA)

    def finish_statistics(self) -> tuple[Tensor, Tensor | None]:
        options = self.options
        rows = self.new_empty(self.N)
        terms = self.new_empty(6, self.N) if options.stats else None
        self.finish_rows(rows, terms)
        return rows if options.reduction == "none" else rows.sum(), terms

    def similarity(self) -> Tensor:
        return similarity_of(self.running[-2:], self.inputs.scale)

    def start_gradients(self, upstream: Tensor | None) -> None:
        self.omega = self.new_empty(self.N)
        self.unit = self.new_empty(2)[0]  # the other one is csrc/cuda's
        self.factors = self.new_zeros(8, self.N)
        self.sums = self.new_zeros(ROW_SUMS, self.N)
        self.prepare_factors(contiguous(upstream))

    def accumulators(self, needs: tuple[bool, ...], out: Towers = (None, None)) -> Towers:
        """(N, width)"""
        dA, dT = (self.new_zeros(self.N, self.width) if need else None for need in needs[:2])
        return dA, dT

    def finish_gradients(
        self, dA: Tensor | None, dT: Tensor | None, out: Towers = (None, None)
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """In float32 or their final dtype."""
        radius = self.inputs.radius
        outputs = [self.output(total, place) for total, place in zip((dA, dT), out, strict=True)]
        rows, totals = self.finish_towers(dT, dA, outputs[1], outputs[0])
        dR = None
        if radius is not None:
            dR = rows if radius.ndim else totals[2].clone()
        return outputs[0], outputs[1], dR, totals[:2]

    def output(self, total: Tensor | None, out: Tensor | None) -> Tensor | None:
        """Where a tower's gradient goes: `out`, if given, or the accumulator where it fits."""
        if total is None or out is not None:
            return out
        if self.dtype == torch.float32 and self.width == self.D:
            return total
        return torch.empty(self.N, self.D, dtype=self.dtype, device=self.device)


def logit_scale_2(scale: Tensor) -> Tensor:
    """k log2(e); not 0, since sums of slope times logit are divided by it."""
    k2 = scale.float() * math.log2(math.e)
    return k2.masked_fill(k2 == 0.0, 1e-30)


def similarity_of(planes: Tensor, scale: Tensor) -> Tensor:
    """(2,) float64: sum and count of <t, a>, from those (2, N) of logits in base 2."""
    total, count = planes.sum(dim=1, dtype=torch.float64)
    return torch.stack((total / logit_scale_2(scale), count))
