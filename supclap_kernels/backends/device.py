"""The GPU backends: the panel engine with kernels between its products.

    panel    the library multiplies the logits of a tile pair; an epilogue reads them
    fused    a tile kernel (Triton) multiplies and reduces them in registers

Both write the weights of a tile pair to a panel, which the library multiplies with the embeddings.
No value is read back: k, b, ids, weights and which rows are literal stay on the device.
Deterministic: partial results go to slots of their own and are added in order. The same code runs
on CPU tensors where a host stands in for the device: Triton's interpreter (TRITON_INTERPRET=1; it
rounds correctly only in float32, so there weights are stored in float32), and tests/shim for
csrc/cuda.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..options import Options
from . import tile_sizes
from .call import Backend, Call, Inputs, saved_elements
from .device_call import DeviceCall, lanes_of, scratch_dtypes, scratch_shapes
from .panel import PLACEHOLDER, Layout, Tiling
from .state import PLANES, ROW_SUMS, STATE_ROWS

PARTIAL = 3
"""Bytes of partial results for each position of a block, at most (16 planes over BLOCK_I rows)."""


def tiling(weight: int, fused: bool) -> Tiling:
    """Two tiles in flight, each with logits, weights (of `weight` bytes) and partial results; or
    one without logits."""
    scratch = weight + PARTIAL if fused else 2 * (4 + weight + PARTIAL)
    return Tiling(tile_sizes.GPU_TILE, tile_sizes.GPU_PAD, tile_sizes.GPU_PAD, scratch)


class DeviceBackend(Backend):
    """`engine` launches; `fused`: its tile kernels compute the logits."""

    def __init__(self, engine: type[DeviceCall], fused: bool) -> None:
        self.engine, self.fused = engine, fused

    def tiling(self, dtype: torch.dtype) -> Tiling:
        return tiling(self.engine.weights_dtype(dtype).itemsize, self.fused)

    def call(
        self, inputs: Inputs, options: Options, state: Tensor | None = None, split: int = 0
    ) -> Call:
        rules = self.tiling(inputs.audio.dtype)
        return self.engine(inputs, options, rules, self.fused, state, split)

    def saved_elements(
        self, N: Any, D: int, dtype: torch.dtype, has_radius: bool, options: Options, keep: bool
    ) -> Any:
        if self.fused and not options.gradient_in_forward:
            return PLACEHOLDER
        rules = self.tiling(dtype)
        return saved_elements(N, D, has_radius, options, 4, keep, rules)

    def memory(self, N: int, D: int, dtype: torch.dtype, has_radius: bool, options: Options) -> int:
        """What `DeviceCall` allocates, in the same order."""
        rules = self.tiling(dtype)
        svr, single = options.support(has_radius), options.gradient_in_forward
        layout = Layout.choose(N, options.grams(has_radius), rules, options.workspace)
        width = tile_sizes.operand_width(D)
        saved = 4 * self.saved_elements(N, D, dtype, has_radius, options, True)
        kept = not single and not self.fused and saved > 4 * PLACEHOLDER
        packed = options.normalize or width != D
        copies = packed + self.engine.rounds_rows(dtype, self.fused)
        operands = 2 * N * width * dtype.itemsize * copies
        held = 4 * STATE_ROWS * N + saved + operands + 4 * N * svr
        total, returned = 2 * N * width * 4, 2 * N * D * dtype.itemsize
        outputs = 0 if dtype == torch.float32 and width == D and not single else returned
        literal = self.engine.literal_bytes(N, width)
        first = self.scratch_bytes(layout, dtype, not kept, True, single)
        second = self.scratch_bytes(layout, dtype, not kept, single, True)
        rows, finishing = self.engine.row_bytes(N, D, dtype, has_radius, options)
        after = max(literal * svr, outputs * (not single) + finishing)
        gradients = 4 * (1 + 8 + ROW_SUMS) * N + rows + total + max(second, after)
        forward_peak = held + 4 * PLANES * N + (gradients if single else first)
        backward_peak = held + gradients
        if single:
            wide = 2 * N * D * 4
            backward_peak = 4 * STATE_ROWS * N + saved + wide
            backward_peak += returned * (dtype != torch.float32)
        return max(forward_peak, backward_peak) - returned

    def scratch_bytes(
        self, layout: Layout, dtype: torch.dtype, panel: bool, statistics: bool, weights: bool
    ) -> int:
        """Of all tiles in flight: what `DeviceCall.lanes` allocates."""
        infonce = not (statistics and weights)
        slots = lambda ni, nj: self.engine.slots_for(  # noqa: E731
            ni, nj, self.fused, weights, layout.grams, infonce, dtype
        )
        shapes = scratch_shapes(layout, slots, self.fused, panel, statistics, weights)
        dtypes = scratch_dtypes(self.engine.weights_dtype(dtype))
        pairs = zip(shapes, dtypes, strict=True)
        each = sum(kind.itemsize * math.prod(shape) for shape, kind in pairs if shape)
        return lanes_of(layout, self.fused) * each
