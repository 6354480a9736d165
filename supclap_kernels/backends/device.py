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

from typing import Any

import torch
from torch import Tensor

from ..options import Options
from . import tile_sizes
from .call import Backend, Call, Tensors, saved_elements
from .device_call import DeviceCall
from .panel import PLACEHOLDER, Tiling

PARTIAL = 3
"""Bytes of partial results for each position of a block, at most (16 planes over BLOCK_I rows)."""


class DeviceBackend(Backend):
    """`engine` launches; `fused`: its tile kernels compute the logits."""

    def __init__(self, engine: type[DeviceCall], fused: bool) -> None:
        self.engine, self.fused = engine, fused

    def tiling(self, dtype: torch.dtype) -> Tiling:
        """Two tiles in flight, each with logits, weights and partial results; or one without
        logits."""
        weight = self.engine.weights_dtype(dtype).itemsize
        scratch = weight + PARTIAL if self.fused else 2 * (4 + weight + PARTIAL)
        return Tiling(tile_sizes.GPU_TILE, tile_sizes.GPU_PAD, tile_sizes.GPU_PAD, scratch)

    def call(
        self, inputs: Tensors, options: Options, state: Tensor | None = None, split: int = 0
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
