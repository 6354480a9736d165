"""The sweeps as one kernel for each tile pair on Hopper (csrc/cuda/hopper): the "cuda"
backend's way to batches that do not fit on the chip."""

import torch
from torch import Tensor

from .. import native
from ..options import Options
from . import contract
from .gpu import GpuBackend
from .gpu_call import Scratch
from .gpu_cuda import CudaCall
from .panel import Tile
from .state import PLAIN

WANTED = True
"""Tests and benchmarks turn it off: then panels take every batch that does not fit on the chip."""
ALONE = False
"""Without support vectors, too: not measured yet, so tests and benchmarks alone turn it on."""


class HopperCall(CudaCall):
    """A call whose tile pairs leave no logits."""

    def launch_tile(self, tile: Tile, panel: Tensor | None, scratch: Scratch) -> None:
        self.native.hopper_tile(*self.place(tile, None, scratch))


def takes(dtype: torch.dtype, has_radius: bool, options: Options) -> bool:
    """16-bit embeddings with support vectors."""
    alone = contract.mode(has_radius, options) == PLAIN
    if not WANTED or dtype == torch.float32 or (alone and not ALONE):
        return False
    on_hopper = native.shim() is not None or torch.cuda.get_device_capability() == (9, 0)
    return on_hopper and hasattr(native.cuda(), "hopper_tile")


HOPPER = GpuBackend(HopperCall, fused=True)
