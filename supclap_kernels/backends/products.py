"""The panel engine's library products, with the float32 results that every dtype needs."""

import torch
from torch import Tensor

from .panel import Products


class LibraryProducts:
    """`torch.mm` in the operands' dtype (float32 or float64)."""

    def logits(self, X: Tensor, Y: Tensor, out: Tensor) -> None:
        torch.mm(X, Y.t(), out=out)

    def accumulate(self, out: Tensor, W: Tensor, X: Tensor) -> None:
        out.addmm_(W, X)


def choose_products(dtype: torch.dtype) -> Products:
    """The products for inputs of this dtype."""
    return LibraryProducts()


def rounds_to_bfloat16() -> bool:
    """Whether bfloat16 inputs take bfloat16 products, whose weights are rounded (MATH.md)."""
    return False
