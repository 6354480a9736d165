"""Small inputs that the tests of the interface share."""

import torch
import torch.nn.functional as F
from torch import Tensor

N, D = 6, 5
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def rows(n: int = N, d: int = D, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)


A, T = rows(seed=1), rows(seed=2)
META = torch.empty(N, D, device="meta")


def close(x: Tensor, y: Tensor, bound: float) -> bool:
    """Whether |x - y| <= bound |y|, in float64."""
    x, y = x.double(), y.double()
    return bool((x - y).norm() <= bound * y.norm())
