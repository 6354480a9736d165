"""One pass of the GPU backends (gpu.py): the tensors on the device, and the kernels' launches."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..options import Options
from . import contract, tiles
from . import triton_epilogue as epilogue
from .contract import STATE_ROWS, Inputs, grams
from .gpu_far import FarRows
from .lanes import in_flight
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
from .triton_backward import tile_backward
from .triton_finish import finish_gradients
from .triton_forward import tile_forward
from .triton_rows import finish_statistics, pack_rows, prepare_rows, row_factors, row_weights
from .triton_tiles import GAP, INTERPRETED, LOG2E, MIRROR, NONE, ONE_SIDED, POSITIVE, SHARED

PLANES, SUMS = 10, 6
"""Of the partial statistics (a pair for each direction, and SIMILARITY), and of the sums."""
ROW_GRID = {"BLOCK_N": tiles.ROWS, "BLOCK_D": tiles.ROW_COLUMNS, "num_warps": 4}


class Scratch(NamedTuple):
    """Working memory of one tile in flight (or its shapes); None for what a sweep does without."""

    panel: Any
    weights: Any
    part_i: Any
    part_j: Any
    sums_i: Any
    sums_j: Any


def slots_of(ni: int, nj: int, block: tiles.Blocks) -> tuple[int, int]:
    """Of the partial results of a tile's rows, and of its columns."""
    return triton.cdiv(nj, block.j) * block.parts, triton.cdiv(ni, block.i)


def lanes_of(layout: Layout, fused: bool) -> int:
    """Two tiles are in flight where there are several and the library's products can hide the
    epilogues; the tile kernels leave nothing to hide."""
    return 1 + (layout.N > layout.side and not fused)


def scratch_shapes(
    layout: Layout,
    block: tiles.Blocks,
    fused: bool,
    panel: bool,
    statistics: bool,
    weights: bool,
) -> Scratch:
    """The shapes of the largest tile's working memory."""
    side = min(layout.side, layout.tiling.padded(layout.N))
    i, j = slots_of(side, side, block)
    size = (layout.scratch_elements,)
    return Scratch(
        size if panel and not fused else None,
        size if weights else None,
        (PLANES, i, side) if statistics else None,
        (PLANES, j, side) if statistics else None,
        (SUMS, i, side) if weights else None,
        (SUMS, j, side) if weights else None,
    )


def architecture(device: torch.device) -> int:
    """Compute capability, 90 for 9.0."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: as PyTorch's own. Narrower ones are exact."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


def kernel_blocks(
    fused: bool, weights: bool, grams: int, infonce: bool, dtype: torch.dtype, arch: int = 90
) -> tiles.Blocks:
    """Of the kernel that reads or makes the logits in a sweep."""
    kernel = ("tile_" if fused else "panel_") + ("weights" if weights else "statistics")
    found = tiles.tuned().get(f"{kernel} {grams} {infonce} {str(dtype)[6:]} {arch}")
    if found is not None:
        return found
    if fused:
        ieee = dtype == torch.float32 and precision(dtype) == "ieee"
        return tiles.tile_blocks(weights, grams, infonce, ieee, dtype.itemsize, arch)
    return tiles.PANEL_WEIGHTS if weights else tiles.PANEL_STATISTICS


def contiguous(x: Tensor | None) -> Tensor | None:
    """Vectors as the kernels read them; an expanded upstream gradient is one number N times."""
    return None if x is None else x.contiguous()


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if INTERPRETED.value else dtype


def scratch_dtypes(dtype: torch.dtype) -> Scratch:
    single = torch.float32
    return Scratch(single, weights_dtype(dtype), single, single, single, single)


class Call:
    """One forward or backward pass."""

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        tiling: Tiling,
        fused: bool,
        state: Tensor | None = None,
    ) -> None:
        self.inputs = inputs = inputs._replace(
            radius=contiguous(inputs.radius),
            ids=contiguous(inputs.ids),
            weight=contiguous(inputs.weight),
        )
        self.options, self.fused = options, fused
        self.device, self.dtype = inputs.audio.device, inputs.audio.dtype
        self.N, self.D = N, D = inputs.audio.shape
        self.width = triton.cdiv(D, tiles.OPERAND_COLUMNS) * tiles.OPERAND_COLUMNS
        self.T, self.A = self.operand(inputs.text), self.operand(inputs.audio)
        self.infonce, has_radius = options.infonce, inputs.radius is not None
        svr, mirror = options.support(has_radius), options.mirror(has_radius)
        shared = options.shared(has_radius)
        kind = MIRROR if mirror else SHARED if shared else ONE_SIDED if svr else NONE
        self.mode: int = kind.value
        self.bias = inputs.bias
        if self.bias is None and not self.infonce:
            self.bias = torch.zeros((), device=self.device)
        self.row_scale = 1.0 / N if options.reduction == "mean" else 1.0
        self.per_row_radius = inputs.radius is not None and inputs.radius.ndim == 1
        self.grams = grams(has_radius, options)
        self.layout = Layout.choose(N, self.grams, tiling, options.workspace)
        self.products = DeviceProducts(self.T, self.A)
        # Which directions and sums a tile adds to: bit d for its rows, and for its columns.
        self.directions = 0b0011 | svr * 0b0100 | (mirror or shared) * 0b1000
        self.sums_of_columns = svr * 0b010100 | mirror * 0b101000
        self.state = self.new_zeros(STATE_ROWS, N) if state is None else state
        if state is None:
            self.running = self.new_empty(PLANES, N)
            prepare_rows[self.row_grid](
                self.T, self.A, inputs.radius, self.state, self.running, N, self.width,
                PER_ROW_RADIUS=self.per_row_radius, MODE=self.mode,
                RENORMALIZE=options.renormalize, **ROW_GRID,
            )  # fmt: skip
        # What every kernel of a sweep is given.
        self.fixed = (self.state, inputs.ids, inputs.scale, self.bias)
        self.far = FarRows(self.T, self.A, self.fixed, self.mode, self.infonce) if svr else None

    def new_empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def new_zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    @property
    def row_grid(self) -> tuple[int]:
        return (triton.cdiv(self.N, tiles.ROWS),)

    def operand(self, X: Tensor) -> Tensor:
        """The rows as the products see them: contiguous, aligned, `width` columns, normalised if
        asked. The rows as given where they are like that."""
        normalize = self.options.normalize
        as_given = X.is_contiguous() and self.width == self.D and X.data_ptr() % 16 == 0
        if as_given and not normalize:
            return X
        length = torch.linalg.vector_norm(X, dim=1, dtype=torch.float32) if normalize else None
        dtype = weights_dtype(self.dtype) if normalize else self.dtype
        out = torch.empty(self.N, self.width, dtype=dtype, device=self.device)
        pack_rows[self.row_grid](
            X, *X.stride(), length, out, self.N, self.D, self.width, **ROW_GRID
        )
        return out.to(self.dtype)

    # One tile.
    def blocks(self, weights: bool) -> tiles.Blocks:
        kind = (self.grams, self.infonce, self.dtype)
        return kernel_blocks(self.fused, weights, *kind, architecture(self.device))

    def lanes(self, panel: bool, statistics: bool, weights: bool) -> list[Scratch]:
        """Scratch of a sweep."""
        block = self.blocks(weights)
        shapes = scratch_shapes(self.layout, block, self.fused, panel, statistics, weights)
        dtypes = scratch_dtypes(self.dtype)
        return [
            Scratch(
                *(
                    None if shape is None else self.new_empty(*shape, dtype=dtype)
                    for shape, dtype in zip(shapes, dtypes, strict=True)
                )
            )
            for _ in range(lanes_of(self.layout, self.fused))
        ]

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

    def launch(self, tile: Tile, panel: Tensor | None, scratch: Scratch) -> None:
        """The kernel of one tile: statistics, weights, or both, as the scratch has room for."""
        weights = scratch.weights is not None
        block = self.blocks(weights)
        grid = (triton.cdiv(tile.ni, block.i), triton.cdiv(tile.nj, block.j))
        place: tuple[int, ...] = tile[:4]
        source: tuple[Tensor | None, ...]
        constants: dict[str, Any] = {
            "BLOCK_I": block.i, "BLOCK_J": block.j, "DIAGONAL": tile.diagonal,
            "MODE": self.mode, "INFONCE": self.infonce, "STATS": self.options.stats,
            "num_warps": block.warps, "num_stages": block.stages,
        }  # fmt: skip
        parts: tuple[Tensor | None, ...] = (scratch.part_i, scratch.part_j)
        if weights:
            parts += (self.factors, scratch.weights, scratch.sums_i, scratch.sums_j)
        if self.fused:
            constants |= {
                "BLOCK_D": block.d,
                "PARTS": block.parts,
                "PRECISION": precision(self.dtype),
            }
            kernel, source = (tile_backward if weights else tile_forward), (self.T, self.A)
            place = (self.width, *place, *((tile.ld, tile.size) if weights else ()))
        else:
            kernel = epilogue.panel_weights if weights else epilogue.panel_statistics
            source, place = (panel,), (*place, tile.ld, tile.size)
        kernel[grid](*source, *self.fixed, *parts, self.N, *place, **constants)

    def merge(self, tile: Tile, scratch: Scratch) -> None:
        """Add the tile's partial results to the running ones."""
        block, vector = self.blocks(scratch.weights is not None), tiles.VECTOR
        i, j = slots_of(tile.ni, tile.nj, block)
        sides = [(scratch.part_i, scratch.sums_i, i, tile.ni, tile.i0)]
        if not tile.diagonal:
            sides.append((scratch.part_j, scratch.sums_j, j, tile.nj, tile.j0))
        for column, (part, sums, slots, count, first) in enumerate(sides):
            blocks, place = triton.cdiv(count, vector), (slots, count, first, self.N)
            if part is not None:
                used = self.directions | (self.options.stats and not column) * 0b10000
                epilogue.merge_statistics[blocks, PLANES // 2](
                    part, self.running, *place, used, INFONCE=self.infonce, BLOCK=vector
                )
            used = self.sums_of_columns | (not column) * 0b11
            if sums is not None and used:
                epilogue.merge_sums[blocks, SUMS](sums, self.sums, *place, used, BLOCK=vector)

    # The sweeps.
    def sweep_statistics(self, kept: Tensor | None) -> None:
        """Sweep 1: `running`; fills `kept` with every tile's logits if it is given."""

        def free(tile: Tile, scratch: Scratch) -> None:
            self.launch(tile, self.logits(tile, kept, scratch, multiply=True), scratch)

        scratch = (kept is None, True, False)
        in_flight(self.device, self.layout.tiles(), self.lanes(*scratch), free, self.merge)
        if self.far is not None:
            self.far.statistics(self.running)

    def sweep_gradients(
        self, dT: Tensor | None, dA: Tensor | None, kept: Tensor | None, with_statistics: bool
    ) -> None:
        """Sweep 2: `sums`, and the products into dT, dA. `with_statistics` adds sweep 1."""

        def free(tile: Tile, scratch: Scratch) -> None:
            self.launch(tile, self.logits(tile, kept, scratch, multiply=kept is None), scratch)

        def ordered(tile: Tile, scratch: Scratch) -> None:
            self.merge(tile, scratch)
            assert scratch.weights is not None
            add_products(dT, dA, tile, blocks(tile, self.grams, scratch.weights), self.products)

        scratch = (kept is None, with_statistics, True)
        in_flight(self.device, self.layout.tiles(), self.lanes(*scratch), free, ordered)
        if self.far is not None:
            if with_statistics:
                self.far.statistics(self.running)
            self.far.gradients(
                self.factors, self.omega, self.unit, self.sums, dT, dA,
                self.options.alpha, self.options.renormalize,
            )  # fmt: skip

    def finish_statistics(self) -> tuple[Tensor, Tensor | None]:
        """The loss; and, for the statistics, the (6, N) terms of `finish_statistics`."""
        options = self.options
        rows = self.new_empty(self.N)
        terms = self.new_empty(6, self.N) if options.stats else None
        finish_statistics[(triton.cdiv(self.N, tiles.VECTOR),)](
            self.running, self.state, *self.fixed[2:], self.inputs.radius, self.inputs.weight,
            rows, terms, self.N, self.row_scale, options.alpha, options.beta,
            PER_ROW_RADIUS=self.per_row_radius, MODE=self.mode, INFONCE=self.infonce,
            BLOCK_N=tiles.VECTOR,
        )  # fmt: skip
        return rows if options.reduction == "none" else rows.sum(), terms

    def start_gradients(self, upstream: Tensor | None) -> None:
        """Weights of the rows' terms in the gradient, from what arrives at the loss."""
        N, alpha = self.N, self.options.alpha
        count = triton.cdiv(N, tiles.VECTOR)
        self.omega, bounds = self.new_empty(N), self.new_empty(2, count)
        self.factors, self.unit = self.new_zeros(8, N), self.new_empty()
        self.sums = self.new_zeros(SUMS + 1, N)  # and RHO_FAR
        common: dict[str, Any] = {"MODE": self.mode, "BLOCK_N": tiles.VECTOR}
        upstream = contiguous(upstream)
        row_weights[(count,)](
            upstream, self.inputs.weight, self.state, self.omega, bounds, N, self.row_scale, alpha,
            PER_ROW=upstream is not None and upstream.ndim == 1, **common,
        )  # fmt: skip
        row_factors[(count,)](
            self.state, self.omega, bounds, self.factors, self.unit, N, count, alpha,
            INFONCE=self.infonce, **common,
        )  # fmt: skip

    def gradients(
        self,
        needs: tuple[bool, ...],
        kept: Tensor | None = None,
        out: tuple[Tensor | None, Tensor | None] = (None, None),
        with_statistics: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """dA, dT of the rows as given (written to `out` if given; None: frozen), dR in the radius'
        shape or None, and (dk, db); in float32 or their final dtype."""
        inputs, options = self.inputs, self.options
        dA, dT = (self.new_zeros(self.N, self.width) if need else None for need in needs[:2])
        self.sweep_gradients(dT, dA, kept, with_statistics)
        outputs = [self.output(total, given) for total, given in zip((dA, dT), out, strict=True)]
        rows = self.new_empty(3, self.N)
        finish_gradients[self.row_grid](
            self.T, self.A, inputs.text, *inputs.text.stride(), inputs.audio,
            *inputs.audio.stride(), self.state, self.sums, self.omega, self.unit,
            *self.fixed[2:], inputs.radius, dT, dA, outputs[1], outputs[0], rows,
            self.N, self.D, self.width, options.alpha, options.beta,
            PER_ROW_RADIUS=self.per_row_radius, MODE=self.mode, INFONCE=self.infonce,
            RENORMALIZE=options.renormalize, NORMALIZE=options.normalize, **ROW_GRID,
        )  # fmt: skip
        totals = rows.sum(dim=1, dtype=torch.float64)
        dR = None
        if inputs.radius is not None:
            dR = rows[2].clone() if inputs.radius.ndim else totals[2]
        return outputs[0], outputs[1], dR, totals[:2]

    def output(self, total: Tensor | None, given: Tensor | None) -> Tensor | None:
        """Where a tower's gradient goes: what is given, or the accumulator where it fits."""
        if total is None or given is not None:
            return given
        dtype = weights_dtype(self.dtype)
        if dtype == torch.float32 and self.width == self.D:
            return total
        return torch.empty(self.N, self.D, dtype=dtype, device=self.device)

    def stats(self, terms: Tensor) -> Tensor:
        """(11,): the values of SVRStats."""
        inputs, nan = self.inputs, self.new_empty(1).fill_(float("nan"))
        weighted = terms[:4] if inputs.weight is None else terms[:4] * inputs.weight
        means = torch.cat((weighted, 1.0 - terms[4:])).mean(dim=1)
        rows = self.state[contract.STATISTICS :]
        similarity, count = self.running[-2:].sum(dim=1, dtype=torch.float64)
        k2 = inputs.scale.float() * LOG2E.value
        negative = similarity / torch.where(k2 == 0.0, 1e-30, k2) / count
        parts = [means, rows[POSITIVE.value].mean()[None], negative.float()[None]]
        if inputs.radius is None:
            parts.append(nan.expand(3))
        else:
            contraction = 1.0 - inputs.radius / rows[GAP.value]
            values = (inputs.radius.float(), rows[GAP.value], contraction)
            parts += [value.mean()[None].float() for value in values]
        return torch.cat(parts)
