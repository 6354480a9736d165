"""Which of the CUDA ways takes a call: one launch (single.py) where the batch fits on the chip,
beyond that the kernels for Hopper or panels (sweeps.py)."""

import torch

from ...options import PLAIN
from .. import available
from . import single


def routes(
    index: int, dtype: torch.dtype, D: int, mode: int, infonce: bool, staged: bool
) -> list[tuple[str, int | None]]:
    """(way, the largest batch that takes it, None: any) on the device `index`, smallest first.

    `staged`: a pass is called stage by stage (distributed.py), so it cannot be one launch.
    """
    large = "cuda:panel"
    if dtype.itemsize == 2 and mode != PLAIN and available.hopper(index) == "ok":
        large = "cuda:hopper"
    if staged:
        return [(large, None)]
    return [("cuda:single", single.limit(D, dtype, mode, infonce, index)), (large, None)]
