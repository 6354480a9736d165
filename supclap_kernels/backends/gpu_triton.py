"""The GPU backends with Triton kernels: launches those of one call."""

from typing import Any

import torch
import triton
from torch import Tensor

from . import tiles
from . import triton_epilogue as epilogue
from .gpu import Backend
from .gpu_call import PLANES, SUMS, Call, Scratch
from .gpu_far import FarRows
from .panel import Tile
from .triton_backward import tile_backward
from .triton_finish import finish_gradients
from .triton_forward import tile_forward
from .triton_rows import finish_statistics, pack_rows, prepare_rows, row_factors, row_weights
from .triton_tiles import INTERPRETED

ROW_GRID = {"BLOCK_N": tiles.ROWS, "BLOCK_D": tiles.ROW_COLUMNS, "num_warps": 4}


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


def slots_of(ni: int, nj: int, block: tiles.Blocks) -> tuple[int, int]:
    return triton.cdiv(nj, block.j) * block.parts, triton.cdiv(ni, block.i)


class TritonKernels:
    """`Kernels` of gpu_call.py, and (the static methods) `Engine` of gpu.py."""

    @staticmethod
    def weights_dtype(dtype: torch.dtype) -> torch.dtype:
        """The interpreter rounds correctly only in float32."""
        return torch.float32 if INTERPRETED.value else dtype

    @staticmethod
    def slots_for(
        ni: int, nj: int, fused: bool, weights: bool, grams: int, infonce: bool, dtype: torch.dtype
    ) -> tuple[int, int]:
        return slots_of(ni, nj, kernel_blocks(fused, weights, grams, infonce, dtype))

    @staticmethod
    def far_bytes(N: int, width: int) -> int:
        blocks = triton.cdiv(N, tiles.FAR_ROWS)
        return 4 * (min(blocks, tiles.FAR_PARTS) * tiles.FAR_ROWS * width + 2 * N)

    def __init__(self, call: Call) -> None:
        self.call = call
        self.row_grid = (triton.cdiv(call.N, tiles.ROWS),)
        self.vector_grid = (triton.cdiv(call.N, tiles.VECTOR),)
        self.found_far: FarRows | None = None

    @property
    def fixed(self) -> tuple[Tensor | None, ...]:
        """What every kernel of a sweep is given."""
        call = self.call
        return (call.state, call.inputs.ids, call.inputs.scale, call.bias)

    def pack(self, X: Tensor, out: Tensor) -> None:
        call, length = self.call, None
        if call.options.normalize:
            length = torch.linalg.vector_norm(X, dim=1, dtype=torch.float32)
        pack_rows[self.row_grid](
            X, *X.stride(), length, out, call.N, call.D, call.width, **ROW_GRID
        )

    def prepare_rows(self) -> None:
        call = self.call
        prepare_rows[self.row_grid](
            call.T, call.A, call.inputs.radius, call.state, call.running, call.N, call.width,
            PER_ROW_RADIUS=call.per_row_radius, MODE=call.mode,
            RENORMALIZE=call.options.renormalize, **ROW_GRID,
        )  # fmt: skip

    def blocks(self, weights: bool) -> tiles.Blocks:
        call = self.call
        kind = (call.grams, call.infonce, call.dtype)
        return kernel_blocks(call.fused, weights, *kind, architecture(call.device))

    def slots(self, ni: int, nj: int, weights: bool) -> tuple[int, int]:
        return slots_of(ni, nj, self.blocks(weights))

    def tile(self, tile: Tile, panel: Tensor | None, scratch: Scratch) -> None:
        call, weights = self.call, scratch.weights is not None
        block = self.blocks(weights)
        grid = (triton.cdiv(tile.ni, block.i), triton.cdiv(tile.nj, block.j))
        place: tuple[int, ...] = tile[:4]
        source: tuple[Tensor | None, ...]
        constants: dict[str, Any] = {
            "BLOCK_I": block.i, "BLOCK_J": block.j, "DIAGONAL": tile.diagonal,
            "MODE": call.mode, "INFONCE": call.infonce, "STATS": call.options.stats,
            "num_warps": block.warps, "num_stages": block.stages,
        }  # fmt: skip
        parts: tuple[Tensor | None, ...] = (scratch.part_i, scratch.part_j)
        if weights:
            parts += (call.factors, scratch.weights, scratch.sums_i, scratch.sums_j)
        if call.fused:
            constants |= {
                "BLOCK_D": block.d,
                "PARTS": block.parts,
                "PRECISION": precision(call.dtype),
            }
            kernel, source = (tile_backward if weights else tile_forward), (call.T, call.A)
            place = (call.width, *place, *((tile.ld, tile.size) if weights else ()))
        else:
            kernel = epilogue.panel_weights if weights else epilogue.panel_statistics
            source, place = (panel,), (*place, tile.ld, tile.size)
        kernel[grid](*source, *self.fixed, *parts, call.N, *place, **constants)

    def merge(self, tile: Tile, scratch: Scratch) -> None:
        call, vector = self.call, tiles.VECTOR
        i, j = self.slots(tile.ni, tile.nj, scratch.weights is not None)
        sides = [(scratch.part_i, scratch.sums_i, i, tile.ni, tile.i0)]
        if not tile.diagonal:
            sides.append((scratch.part_j, scratch.sums_j, j, tile.nj, tile.j0))
        for column, (part, sums, slots, count, first) in enumerate(sides):
            blocks, place = triton.cdiv(count, vector), (slots, count, first, call.N)
            if part is not None:
                used = call.directions | (call.options.stats and not column) * 0b10000
                epilogue.merge_statistics[blocks, PLANES // 2](
                    part, call.running, *place, used, INFONCE=call.infonce, BLOCK=vector
                )
            used = call.sums_of_columns | (not column) * 0b11
            if sums is not None and used:
                epilogue.merge_sums[blocks, SUMS](sums, call.sums, *place, used, BLOCK=vector)

    @property
    def far(self) -> FarRows:
        if self.found_far is None:
            call = self.call
            self.found_far = FarRows(call.T, call.A, self.fixed, call.mode, call.infonce)
        return self.found_far

    def far_statistics(self) -> None:
        self.far.statistics(self.call.running)

    def far_gradients(self, dT: Tensor | None, dA: Tensor | None) -> None:
        call = self.call
        self.far.gradients(
            call.factors, call.omega, call.unit, call.sums, dT, dA,
            call.options.alpha, call.options.renormalize,
        )  # fmt: skip

    def finish_statistics(self, rows: Tensor, terms: Tensor | None) -> None:
        call = self.call
        finish_statistics[self.vector_grid](
            call.running, call.state, *self.fixed[2:], call.inputs.radius, call.inputs.weight,
            rows, terms, call.N, call.row_scale, call.options.alpha, call.options.beta,
            PER_ROW_RADIUS=call.per_row_radius, MODE=call.mode, INFONCE=call.infonce,
            BLOCK_N=tiles.VECTOR,
        )  # fmt: skip

    def start_gradients(self, upstream: Tensor | None) -> None:
        call, alpha = self.call, self.call.options.alpha
        (count,) = self.vector_grid
        bounds = call.new_empty(2, count)
        common: dict[str, Any] = {"MODE": call.mode, "BLOCK_N": tiles.VECTOR}
        row_weights[self.vector_grid](
            upstream, call.inputs.weight, call.state, call.omega, bounds, call.N, call.row_scale,
            alpha, PER_ROW=upstream is not None and upstream.ndim == 1, **common,
        )  # fmt: skip
        row_factors[self.vector_grid](
            call.state, call.omega, bounds, call.factors, call.unit, call.N, count, alpha,
            INFONCE=call.infonce, **common,
        )  # fmt: skip

    def finish_gradients(
        self, dT: Tensor | None, dA: Tensor | None, text: Tensor | None, audio: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        call, given, options = self.call, self.call.inputs, self.call.options
        rows = call.new_empty(3, call.N)
        finish_gradients[self.row_grid](
            call.T, call.A, given.text, *given.text.stride(), given.audio,
            *given.audio.stride(), call.state, call.sums, call.omega, call.unit,
            *self.fixed[2:], given.radius, dT, dA, text, audio, rows,
            call.N, call.D, call.width, options.alpha, options.beta,
            PER_ROW_RADIUS=call.per_row_radius, MODE=call.mode, INFONCE=call.infonce,
            RENORMALIZE=options.renormalize, NORMALIZE=options.normalize, **ROW_GRID,
        )  # fmt: skip
        return rows[2].clone(), rows.sum(dim=1, dtype=torch.float64)


PANEL, TRITON = Backend(TritonKernels, fused=False), Backend(TritonKernels, fused=True)
