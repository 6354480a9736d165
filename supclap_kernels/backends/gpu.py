"""The GPU backends: the panel engine with kernels between its products.

    panel    the library multiplies the logits of a tile pair; an epilogue reads them
    fused    a tile kernel (Triton) multiplies and reduces them in registers

Both write the weights of a tile pair to a panel, which the library multiplies with the embeddings.
No value is read back: k, b, ids, weights and which rows are far stay on the device. Deterministic:
partial results go to slots of their own and are added in order. The same code runs on CPU tensors
where a host stands in for the device: Triton's interpreter (TRITON_INTERPRET=1; it rounds correctly
only in float32, so there outputs are float32 and PyTorch casts them), and tests/shim for csrc/cuda.
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from ..options import Options
from . import contract, tiles
from .contract import Inputs, grams, split_gradients
from .gpu_call import (
    PLANES,
    SUMS,
    Call,
    lanes_of,
    scratch_dtypes,
    scratch_shapes,
    statistics,
)
from .panel import PLACEHOLDER, Layout, Tiling, kept_panels

PARTIAL = 3
"""Bytes of partial results for each position of a block, at most (16 planes over BLOCK_I rows)."""


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def tiling(weight: int, fused: bool) -> Tiling:
    """Two tiles in flight, each with logits, weights (of `weight` bytes) and partial results; or
    one without logits."""
    scratch = weight + PARTIAL if fused else 2 * (4 + weight + PARTIAL)
    return Tiling(tiles.GPU_TILE, tiles.GPU_PAD, tiles.GPU_PAD, scratch)


class Backend:
    """What dispatch calls. `engine` launches; `fused`: its tile kernels compute the logits."""

    def __init__(self, engine: type[Call], fused: bool) -> None:
        self.engine, self.fused = engine, fused

    def tiling(self, dtype: torch.dtype) -> Tiling:
        return tiling(self.engine.weights_dtype(dtype).itemsize, self.fused)

    def call(self, inputs: Inputs, options: Options, split: int = 0) -> Call:
        rules = self.tiling(inputs.audio.dtype)
        return self.engine(inputs, options, rules, self.fused, split=split)

    def saved_elements(
        self, N: Any, D: int, dtype: torch.dtype, has_radius: bool, options: Options, keep: bool
    ) -> Any:
        """Length of the buffer that forward leaves for backward; N may be symbolic."""
        if self.fused and not options.gradient_in_forward:
            return PLACEHOLDER
        rules = self.tiling(dtype)
        return contract.saved_elements(N, D, has_radius, options, 4, keep, rules)

    def forward(
        self, inputs: Inputs, options: Options, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """loss (or rows of it), the values of SVRStats (or empty), state (22, N), and `saved`."""
        with device_of(inputs.audio):
            rules = self.tiling(inputs.audio.dtype)
            call = self.engine(inputs, options, rules, self.fused)
            has_radius, keep = inputs.radius is not None, any(needs)
            size = self.saved_elements(call.N, call.D, call.dtype, has_radius, options, keep)
            saved = call.new_empty(size)
            if keep and options.gradient_in_forward:
                dA, dT, dR, scalars = split_gradients(saved.zero_(), call.N, call.D)
                call.start_gradients(None)
                out = (dA if needs[0] else None, dT if needs[1] else None)
                sums = call.accumulators(needs[:2])
                call.sweep_gradients(sums[1], sums[0], None, with_statistics=True)
                *_, dR_given, dk_db = call.finish_gradients(sums[0], sums[1], out)
                scalars.copy_(dk_db)
                if dR_given is not None:
                    dR[: dR_given.numel()].copy_(dR_given)
            else:
                call.sweep_statistics(kept_panels(saved))
                if size == PLACEHOLDER:
                    saved.zero_()  # no output is undefined
            loss, terms = call.finish_statistics()
            stats = call.new_empty(0)
            if terms is not None:
                stats = statistics(call.inputs, terms, call.state, call.running)
            return loss, stats, call.state, saved

    def backward(
        self,
        inputs: Inputs,
        options: Options,
        needs: tuple[bool, ...],
        upstream: Tensor,
        state: Tensor,
        saved: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradients of audio, text, radius, scale, bias, each in its own dtype, or empty."""
        with device_of(inputs.audio):
            if options.gradient_in_forward:
                gradients = contract.reduced_gradients(inputs, saved, upstream)
                return contract.returned(inputs, needs, *gradients)
            rules = self.tiling(inputs.audio.dtype)
            call = self.engine(inputs, options, rules, self.fused, state)
            call.start_gradients(upstream)
            kept = None if self.fused else kept_panels(saved)
            sums = call.accumulators(needs[:2])
            call.sweep_gradients(sums[1], sums[0], kept)
            return contract.returned(inputs, needs, *call.finish_gradients(sums[0], sums[1]))

    def memory(self, N: int, D: int, dtype: torch.dtype, has_radius: bool, options: Options) -> int:
        """Bytes at the peak of forward and backward, beyond the inputs and the returned gradients:
        what `Call` allocates, in the same order."""
        rules = self.tiling(dtype)
        svr, single = options.support(has_radius), options.gradient_in_forward
        layout = Layout.choose(N, grams(has_radius, options), rules, options.workspace)
        width = tiles.operand_width(D)
        saved = 4 * self.saved_elements(N, D, dtype, has_radius, options, True)
        kept = not single and not self.fused and saved > 4 * PLACEHOLDER
        packed = options.normalize or width != D
        operands = 2 * N * width * dtype.itemsize * packed
        held = 4 * contract.STATE_ROWS * N + saved + operands + 4 * N * svr
        total, returned = 2 * N * width * 4, 2 * N * D * dtype.itemsize
        outputs = 0 if dtype == torch.float32 and width == D and not single else returned
        far = self.engine.far_bytes(N, width)
        first = self.scratch_bytes(layout, dtype, not kept, True, single)
        second = self.scratch_bytes(layout, dtype, not kept, single, True)
        after = max(far * svr, outputs * (not single) + 4 * 3 * N)
        gradients = 4 * (1 + 8 + SUMS + 1) * N + total + max(second, after)
        forward_peak = held + 4 * PLANES * N + (gradients if single else first)
        backward_peak = held + gradients
        if single:
            wide = 2 * N * D * 4
            backward_peak = 4 * contract.STATE_ROWS * N + saved + wide
            backward_peak += returned * (dtype != torch.float32)
        return max(forward_peak, backward_peak) - returned

    def scratch_bytes(
        self, layout: Layout, dtype: torch.dtype, panel: bool, statistics: bool, weights: bool
    ) -> int:
        """Of all tiles in flight: what `Call.lanes` allocates."""
        infonce = not (statistics and weights)
        slots = lambda ni, nj: self.engine.slots_for(  # noqa: E731
            ni, nj, self.fused, weights, layout.grams, infonce, dtype
        )
        shapes = scratch_shapes(layout, slots, self.fused, panel, statistics, weights)
        dtypes = scratch_dtypes(self.engine.weights_dtype(dtype))
        pairs = zip(shapes, dtypes, strict=True)
        each = sum(kind.itemsize * math.prod(shape) for shape, kind in pairs if shape)
        return lanes_of(layout, self.fused) * each
