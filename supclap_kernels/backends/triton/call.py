"""What launches the Triton kernels of a call."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from .. import tile_sizes
from ..device import DeviceBackend
from ..device_call import Scratch
from ..panel import Tile
from ..state import PLANES, TILE_SUMS
from .literal_rows import LiteralRows
from .merge import merge_statistics, merge_sums
from .panel import panel_statistics, panel_weights
from .rows import RowCall
from .sweeps import tile_backward, tile_forward
from .tile import INTERPRETED, launch


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


def rounded_to_tf32(X: Tensor) -> Tensor:
    """To nearest: the tensor cores would drop all but 10 bits, and so shrink every product."""
    bits = X.view(torch.int32).add(0x1000).bitwise_and_(~0x1FFF)
    return bits.view(torch.float32).masked_fill_(X.isnan(), float("nan"))


def kernel_blocks(
    fused: bool, weights: bool, grams: int, infonce: bool, dtype: torch.dtype, arch: int = 90
) -> tile_sizes.Blocks:
    """Of the kernel that reads or makes the logits in a sweep."""
    kernel = ("tile_" if fused else "panel_") + ("weights" if weights else "statistics")
    found = tile_sizes.tuned().get(f"{kernel} {grams} {infonce} {str(dtype)[6:]} {arch}")
    if found is not None:
        return found
    if fused:
        ieee = dtype == torch.float32 and precision(dtype) == "ieee"
        return tile_sizes.tile_blocks(weights, grams, infonce, ieee, dtype.itemsize, arch)
    return tile_sizes.PANEL_WEIGHTS if weights else tile_sizes.PANEL_STATISTICS


def slots_of(ni: int, nj: int, block: tile_sizes.Blocks) -> tuple[int, int]:
    return triton.cdiv(nj, block.j) * block.parts, triton.cdiv(ni, block.i)


class TritonCall(RowCall):
    """A call that launches Triton kernels for the work on pairs of rows."""

    @staticmethod
    def weights_dtype(dtype: torch.dtype) -> torch.dtype:
        """The interpreter rounds correctly only in float32."""
        return torch.float32 if INTERPRETED.value else dtype

    def prepare_launches(self) -> None:
        self.literal_rows_found: LiteralRows | None = None

    @functools.cached_property
    def multiplied(self) -> tuple[Tensor, Tensor]:
        """The rows as the tile kernels multiply them."""
        if precision(self.dtype) != "tf32":
            return self.T, self.A
        return rounded_to_tf32(self.T), rounded_to_tf32(self.A)

    @property
    def fixed(self) -> tuple[Tensor | None, ...]:
        """What every kernel of a sweep is given."""
        return (self.state, self.inputs.ids, self.inputs.scale, self.bias)

    def blocks(self, weights: bool) -> tile_sizes.Blocks:
        kind = (self.grams, self.infonce, self.dtype)
        return kernel_blocks(self.fused, weights, *kind, architecture(self.device))

    def slots(self, ni: int, nj: int, weights: bool) -> tuple[int, int]:
        return slots_of(ni, nj, self.blocks(weights))

    def launch_tile(self, tile: Tile, panel: Tensor | None, scratch: Scratch) -> None:
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
            kernel = tile_backward if weights else tile_forward
            source = self.multiplied
            place = (self.width, *place, *((tile.ld, tile.size) if weights else ()))
        else:
            kernel = panel_weights if weights else panel_statistics
            source, place = (panel,), (*place, tile.ld, tile.size)
        launch(kernel, grid, *source, *self.fixed, *parts, self.N, *place, **constants)

    def merge_tile(self, tile: Tile, scratch: Scratch) -> None:
        i, j = self.slots(tile.ni, tile.nj, scratch.weights is not None)
        sides = [(scratch.part_i, scratch.sums_i, i, tile.ni, tile.i0)]
        if not tile.diagonal:
            sides.append((scratch.part_j, scratch.sums_j, j, tile.nj, tile.j0))
        for column, (part, sums, slots, count, first) in enumerate(sides):
            blocks, place = triton.cdiv(count, tile_sizes.MERGE_ROWS), (slots, count, first, self.N)
            shape = {"SLOTS": tile_sizes.MERGE_SLOTS, "BLOCK": tile_sizes.MERGE_ROWS}
            if part is not None:
                used = self.directions | (self.options.stats and not column) * 0b10000
                launch(
                    merge_statistics,
                    (blocks, PLANES // 2),
                    part,
                    self.running,
                    *place,
                    used,
                    INFONCE=self.infonce,
                    **shape,
                )
            used = self.sums_of_columns | (not column) * 0b11
            if sums is not None and used:
                launch(merge_sums, (blocks, TILE_SUMS), sums, self.sums, *place, used, **shape)

    @property
    def literal(self) -> LiteralRows:
        if self.literal_rows_found is None:
            kind = (self.mode, self.infonce, self.split)
            self.literal_rows_found = LiteralRows(self.T, self.A, self.fixed, *kind)
        return self.literal_rows_found

    def literal_statistics(self) -> None:
        self.literal.statistics(self.running)

    def literal_gradients(self, dT: Tensor | None, dA: Tensor | None) -> None:
        slopes = self.support_slopes / self.unit
        if self.split:  # pairs between two groups of rows: none of them is a positive
            slopes.zero_()
        renormalize = self.options.renormalize
        self.literal.gradients(self.factors, slopes, self.sums, dT, dA, renormalize)


PANEL, TILE = DeviceBackend(TritonCall, fused=False), DeviceBackend(TritonCall, fused=True)
