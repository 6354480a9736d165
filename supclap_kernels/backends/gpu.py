"""The GPU backends: the panel engine with Triton kernels.

    "panel"    the library multiplies the logits of a tile pair; an epilogue reads them
    "triton"   a tile kernel multiplies and reduces them in registers

Both write the weights of a tile pair to a panel, which the library multiplies with the embeddings.
No value is read back: k, b, ids, weights and which rows are far stay on the device. Deterministic:
partial results go to slots of their own and are added in order. The same code runs on CPU tensors
in Triton's interpreter (TRITON_INTERPRET=1), which rounds correctly only in float32, so there
outputs are float32 and PyTorch casts them.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..options import Options
from . import contract, tiles
from .contract import Inputs, split_gradients
from .gpu_call import Call, weights_dtype
from .panel import PLACEHOLDER, Tiling, kept_panels

PARTIAL = 3
"""Bytes of partial results for each position of a block, at most (16 planes over BLOCK_I rows)."""


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def tiling(dtype: torch.dtype, fused: bool) -> Tiling:
    """Two tiles in flight, each with logits, weights and partial results; or one without logits."""
    weight = weights_dtype(dtype).itemsize
    scratch = weight + PARTIAL if fused else 2 * (4 + weight + PARTIAL)
    return Tiling(tiles.GPU_TILE, tiles.GPU_PAD, tiles.GPU_PAD, scratch)


class Backend:
    """What dispatch calls; `fused`: the tile kernels compute the logits."""

    def __init__(self, fused: bool) -> None:
        self.fused = fused

    def saved_elements(
        self, N: Any, D: int, dtype: torch.dtype, has_radius: bool, options: Options, keep: bool
    ) -> Any:
        """Length of the buffer that forward leaves for backward; N may be symbolic."""
        if self.fused and not options.gradient_in_forward:
            return PLACEHOLDER
        rules = tiling(dtype, self.fused)
        return contract.saved_elements(N, D, has_radius, options, 4, keep, rules)

    def forward(
        self, inputs: Inputs, options: Options, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """loss (or rows of it), the values of SVRStats (or empty), state (22, N), and `saved`."""
        with device_of(inputs.audio):
            rules = tiling(inputs.audio.dtype, self.fused)
            call = Call(inputs, options, rules, self.fused)
            has_radius, keep = inputs.radius is not None, any(needs)
            size = self.saved_elements(call.N, call.D, call.dtype, has_radius, options, keep)
            saved = call.new_empty(size)
            if keep and options.gradient_in_forward:
                dA, dT, dR, scalars = split_gradients(saved.zero_(), call.N, call.D)
                call.start_gradients(None)
                out = (dA if needs[0] else None, dT if needs[1] else None)
                *_, dR_given, dk_db = call.gradients(needs, out=out, with_statistics=True)
                scalars.copy_(dk_db)
                if dR_given is not None:
                    dR[: dR_given.numel()].copy_(dR_given)
            else:
                call.sweep_statistics(kept_panels(saved))
                if size == PLACEHOLDER:
                    saved.zero_()  # no output is undefined
            loss, terms = call.finish_statistics()
            stats = call.new_empty(0) if terms is None else call.stats(terms)
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
            rules = tiling(inputs.audio.dtype, self.fused)
            call = Call(inputs, options, rules, self.fused, state)
            call.start_gradients(upstream)
            kept = None if self.fused else kept_panels(saved)
            return contract.returned(inputs, needs, *call.gradients(needs, kept))


PANEL, TRITON = Backend(fused=False), Backend(fused=True)
