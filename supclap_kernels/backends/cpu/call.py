"""The CPU backend: the panel engine with PyTorch's products (bfloat16: our own) and the C++
epilogues of csrc/cpu.

Deterministic: the epilogues' results do not depend on the number of threads, and the library's
products are repeatable.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import native
from ...gradients import normalize_gradient
from ...options import Options
from ...reference import accumulator_dtype
from ..call import Backend, Call, Tensors, Towers, saved_elements
from ..one_way import Block
from ..panel import Layout, Tile, Tiling, sweep_gradients, sweep_statistics
from ..products import (
    Bfloat16Products,
    LibraryProducts,
    OwnProducts,
    Products,
    multiplies_itself,
    rounds_to_bfloat16,
)
from ..state import DIRECTIONS, ROW_SUMS, STATE_GEOMETRY, STATE_ROWS
from ..statistics import negatives_between
from ..tile_sizes import CPU_TILE, CPU_TILE_MINIMUM

TILING = {
    dtype: Tiling(CPU_TILE, CPU_TILE_MINIMUM, 1, dtype.itemsize)
    for dtype in (torch.float32, torch.float64)
}
"""By the accumulator's dtype: one panel, turned into weights in place."""


def native_problem(
    N: int, D: int, dtype: torch.dtype, dimensions: int | None, options: Options
) -> Any:
    """A CpuProblem without pointers, k, b, threads. `dimensions`: of the radius, None without."""
    has_radius = dimensions is not None
    p = native.module().CpuProblem()
    p.N, p.D, p.is_double = N, D, dtype == torch.float64
    p.infonce, p.svr = options.infonce, options.support(has_radius)
    p.mirror, p.shared = options.mirror(has_radius), options.shared(has_radius)
    p.renormalize, p.per_row_radius = options.renormalize, dimensions == 1
    p.mean, p.per_row = options.reduction == "mean", options.reduction == "none"
    p.alpha, p.beta = options.alpha, options.beta
    return p


class CpuCall:
    """One pass (call.Call): the operands, and the native CpuProblem that points into them."""

    unit: Any = None
    fused = False
    writes_weights = True

    def __init__(
        self, inputs: Tensors, options: Options, state: Tensor | None = None, split: int = 0
    ) -> None:
        self.device = inputs.audio.device
        self.native: Any = native.module()
        if inputs.audio.is_meta:
            self.native = native.Unlaunched(self.native)
        self.inputs, self.options, self.split = inputs, options, split
        self.dtype = dtype = accumulator_dtype(inputs.audio.dtype)
        self.one_way_bytes = dtype.itemsize
        self.rounded = inputs.audio.dtype == torch.bfloat16 and rounds_to_bfloat16()
        self.T, self.A = self.operand(inputs.text), self.operand(inputs.audio)
        self.N, self.D = N, D = self.T.shape
        has_radius = inputs.radius is not None
        self.grams = options.grams(has_radius)
        self.layout = Layout.choose(
            N, self.grams, TILING[dtype], options.workspace, split, inputs.audio.is_meta
        )
        self.products = self.choose_products()
        # All that is (., N): the statistics and the rows' geometry, which backward gets from
        # forward; factors and omega; running and sums.
        new = torch.zeros if options.gradient_in_forward else torch.empty  # sweep 2 reads it first
        self.state = new(STATE_ROWS, N, dtype=dtype, device=self.device) if state is None else state
        self.factors = self.new_empty(2 * DIRECTIONS + 1, N)
        self.wide = self.new_empty(2 * DIRECTIONS + ROW_SUMS, N, dtype=torch.float64)
        self.R, self.w = self.vector(inputs.radius), self.vector(inputs.weight)
        self.code = None
        if inputs.ids is not None:
            self.known_ids, code = torch.unique(inputs.ids, return_inverse=True)
            self.code = code.to(torch.int32)
        dimensions = None if self.R is None else self.R.ndim
        p = self.problem = native_problem(N, D, dtype, dimensions, options)
        p.threads, p.split = torch.get_num_threads(), split
        p.k = inputs.scale.to(dtype).item()
        p.b = 0.0 if inputs.bias is None else inputs.bias.to(dtype).item()
        p.T, p.A = native.address(self.T), native.address(self.A)
        p.R, p.w, p.code = (native.address(x) for x in (self.R, self.w, self.code))
        p.state, row = self.state.data_ptr(), N * dtype.itemsize
        p.rows = p.state + STATE_GEOMETRY * row
        p.factors = self.factors.data_ptr()
        p.omega = p.factors + 2 * DIRECTIONS * row
        p.running = self.wide.data_ptr()
        p.sums = p.running + 2 * DIRECTIONS * N * 8
        if state is None:
            self.native.prepare_rows(p)
        self.literal = bool(self.native.count_literal(p))

    def vector(self, x: Tensor | None) -> Tensor | None:
        """(N,) or 0-d values as the kernels read them."""
        return None if x is None else x.to(self.dtype).contiguous()

    def operand(self, X: Tensor) -> Tensor:
        """The rows as the products see them: contiguous, wide, normalised if asked."""
        rows = X.to(self.dtype)
        if self.options.normalize:
            rows = F.normalize(rows, dim=1)
            if self.rounded:
                rows = rows.to(torch.bfloat16).to(self.dtype)
        return rows.contiguous()

    def normalized(self) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16 if self.rounded else self.dtype
        return self.T.to(dtype), self.A.to(dtype)

    def choose_products(self) -> Products:
        if not self.rounded:
            if multiplies_itself():
                return OwnProducts(self.T, self.A, self.native)
            return LibraryProducts(self.T, self.A)
        rows = self.inputs.text, self.inputs.audio
        if self.options.normalize:
            rows = self.T.to(torch.bfloat16), self.A.to(torch.bfloat16)
        return Bfloat16Products(*rows, self.native, self.split)

    def exponential(self, x: Tensor) -> Tensor:
        return x.exp()

    @property
    def log_sums(self) -> Tensor:
        """float64"""
        return self.wide[: 2 * DIRECTIONS].view(2, DIRECTIONS, self.N)

    @property
    def sums(self) -> Tensor:
        """float64: CpuProblem::sums"""
        return self.wide[2 * DIRECTIONS :]

    # The epilogue of the panel engine.
    def hide_pairs(self, tile: Tile, panel: Tensor) -> None:
        if tile.diagonal or self.code is not None:
            self.native.hide_pairs(self.problem, *tile[:4], panel.data_ptr())

    def statistics(self, tile: Tile, panel: Tensor) -> None:
        self.native.statistics(self.problem, *tile[:4], panel.data_ptr())

    def weights(self, tile: Tile, panel: Tensor, out: Tensor) -> None:
        self.native.weights(self.problem, *tile[:4], panel.data_ptr(), out.data_ptr())

    # Rows against further columns.
    def columns(self, X: Tensor) -> Tensor:
        return X.to(self.dtype).contiguous()

    def column_code(self, ids: Tensor | None) -> Tensor | None:
        """The rows' code of each of these ids, -1 for one that no row has."""
        if ids is None:
            return None
        ids = ids.contiguous()
        places = torch.searchsorted(self.known_ids, ids).clamp_max(len(self.known_ids) - 1)
        return torch.where(self.known_ids[places] == ids, places, -1).to(torch.int32)

    def one_way_products(self, X: Tensor, Y: Tensor) -> Products:
        if self.rounded:
            return Bfloat16Products(X.to(torch.bfloat16), Y.to(torch.bfloat16), self.native)
        if multiplies_itself():
            return OwnProducts(X, Y, self.native)
        return LibraryProducts(X, Y)

    def one_way_statistics(
        self, direction: int, block: Block, code: Tensor | None, panel: Tensor
    ) -> None:
        place = (block.I.start, *block.shape, native.address(code))
        self.native.one_way_statistics(self.problem, direction, *place, panel.data_ptr())

    def one_way_weights(
        self, direction: int, block: Block, code: Tensor | None, panel: Tensor, out: Tensor
    ) -> Tensor:
        """In a panel that was kept the pairs of equal ids are hidden, and it is only read."""
        code = code if panel.data_ptr() == out.data_ptr() else None
        place = (block.I.start, *block.shape, native.address(code))
        self.native.one_way_weights(
            self.problem, direction, *place, panel.data_ptr(), out.data_ptr()
        )
        return out

    def finish_columns(self, total: Tensor) -> Tensor:
        return total

    # The stages.
    def new_empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def scratch(self) -> Tensor:
        return self.new_empty(self.layout.scratch_elements)

    def sweep_statistics(self, kept: Tensor | None) -> None:
        scratch = self.scratch() if kept is None else None
        sweep_statistics(self.layout, self.products, self, kept, scratch)
        self.literal_statistics()

    def literal_statistics(self) -> None:
        if self.literal:
            self.native.literal_statistics(self.problem)

    def finish_statistics(self) -> tuple[Tensor, Tensor | None]:
        loss = self.new_empty(self.N) if self.problem.per_row else self.new_empty()
        terms = self.new_empty(6, self.N, dtype=torch.float64) if self.options.stats else None
        self.native.finish_statistics(self.problem, loss.data_ptr(), native.address(terms))
        return loss, terms

    def similarity(self) -> Tensor:
        whole = slice(0, self.N)
        return negatives_between(self.T, self.A, self.inputs.ids, whole, whole)

    def start_gradients(self, upstream: Tensor | None) -> None:
        self.upstream = self.vector(upstream)
        self.problem.upstream = native.address(self.upstream)
        self.native.prepare_weights(self.problem)

    def accumulators(self, needs: tuple[bool, ...], out: Towers = (None, None)) -> Towers:
        """The gradients' own place."""
        dA, dT = out
        shape: dict[str, Any] = {
            "size": (self.N, self.D),
            "dtype": self.dtype,
            "device": self.device,
        }
        if needs[0] and dA is None:
            dA = torch.zeros(**shape)
        if needs[1] and dT is None:
            dT = torch.zeros(**shape)
        return dA, dT

    def sweep_gradients(
        self,
        dA: Tensor | None,
        dT: Tensor | None,
        kept: Tensor | None,
        with_statistics: bool = False,
    ) -> None:
        arguments = (self.layout, self.products, self, kept, self.scratch(), with_statistics)
        sweep_gradients(dT, dA, *arguments)
        if with_statistics:
            self.literal_statistics()
        if self.literal:
            pointers = (native.address(x) for x in (dT, dA))
            self.native.literal_gradients(self.problem, *pointers)

    def finish_gradients(
        self, dA: Tensor | None, dT: Tensor | None, out: Towers = (None, None)
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """In place."""
        dR = None if self.R is None else torch.empty_like(self.R)
        scalars = self.new_empty(2)
        pointers = (native.address(x) for x in (dT, dA, dR, scalars))
        self.native.finish_gradients(self.problem, *pointers)
        if self.options.normalize:
            for X, dX in ((self.inputs.audio, dA), (self.inputs.text, dT)):
                if dX is not None:
                    dX.copy_(normalize_gradient(X.to(self.dtype), dX))
        return dA, dT, dR, scalars


class CpuBackend(Backend):
    def call(
        self, inputs: Tensors, options: Options, state: Tensor | None = None, split: int = 0
    ) -> Call:
        return CpuCall(inputs, options, state, split)

    def saved_elements(
        self, N: Any, D: int, dtype: torch.dtype, has_radius: bool, options: Options, keep: bool
    ) -> Any:
        wide = accumulator_dtype(dtype)
        return saved_elements(N, D, has_radius, options, wide.itemsize, keep, TILING[wide])


CPU = CpuBackend()
