"""Which of the CUDA ways takes a call: one launch (single.py) where the batch fits on the chip,
beyond that the kernels for Hopper or panels (sweeps.py)."""

import torch

from ...options import PLAIN
from .. import available
from ..call import Route
from . import single


def routes(
    index: int, dtype: torch.dtype, D: int, mode: int, infonce: bool, staged: bool
) -> list[Route]:
    """The ways on the device `index`, smallest batches first.

    `staged`: a pass is called stage by stage (distributed.py), so it cannot be one launch.
    """
    large = Route("cuda:panel", None, "panels; not compared with eager PyTorch in such calls")
    if dtype.itemsize == 2 and mode != PLAIN and available.hopper(index) == "ok":
        reason = "measured fastest on an H200 for large batches with support vectors in 16 bits"
        large = Route("cuda:hopper", None, reason)
    if staged:
        return [large]
    largest = single.limit(D, dtype, mode, infonce, index)
    return [Route("cuda:single", largest, "one launch, since the batch fits on the chip"), large]


def single_route(
    way: str, index: int, dtype: torch.dtype, D: int, mode: int, infonce: bool, reason: str
) -> Route:
    """Of the one launch, asked for by name."""
    largest = single.limit(D, dtype, mode, infonce, index, single.side_of(way))
    return Route(way, largest, reason)
