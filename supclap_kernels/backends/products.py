"""The panel engine's products, with the wide results that every dtype needs.

Both kinds own the stacked operand: TEXT and AUDIO name its halves.
"""

import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native

TEXT, AUDIO = 0, 1


def rows(X: Tensor, part: slice) -> Tensor:
    """X[part], without a view where that is all of X."""
    return X if part.stop - part.start == X.shape[0] else X[part]


class Products(Protocol):
    """What the engine multiplies with."""

    def logits(self, x: int, I: slice, y: int, J: slice, out: Tensor) -> None:
        """out (I, J) = X_I Y_J^T."""

    def accumulate(self, out: Tensor, W: Tensor, y: int, J: slice) -> None:
        """out (., D) += W Y_J; W (., J) is contiguous or the transpose of what is."""


class LibraryProducts:
    """`torch.mm` in float32 or float64."""

    def __init__(self, T: Tensor, A: Tensor) -> None:
        self.sides = (T, A)

    def logits(self, x: int, I: slice, y: int, J: slice, out: Tensor) -> None:
        torch.mm(rows(self.sides[x], I), rows(self.sides[y], J).t(), out=out)  # [I, D] @ [D, J]

    def accumulate(self, out: Tensor, W: Tensor, y: int, J: slice) -> None:
        out.addmm_(W, rows(self.sides[y], J))  # [., J] @ [J, D]


class OwnProducts:
    """Products by the kernels' own micro-kernel (csrc/cpu/products.h), in float32 or float64."""

    def __init__(self, T: Tensor, A: Tensor, module: Any) -> None:
        self.sides, self.module, self.threads = (T, A), module, torch.get_num_threads()

    def logits(self, x: int, I: slice, y: int, J: slice, out: Tensor) -> None:
        self.multiply(rows(self.sides[x], I), rows(self.sides[y], J).t(), out, add=False)

    def accumulate(self, out: Tensor, W: Tensor, y: int, J: slice) -> None:
        self.multiply(W, rows(self.sides[y], J), out, add=True)

    def multiply(self, X: Tensor, Y: Tensor, out: Tensor, add: bool) -> None:
        """out (M, N) (+)= X (M, K) Y (K, N), each of which is contiguous in one dimension."""
        (M, N), K = out.shape, X.shape[1]
        left, right = (X.data_ptr(), *X.stride()), (Y.data_ptr(), *Y.stride())
        sizes = (M, N, K, out.data_ptr(), out.stride(0), add, self.threads)
        self.module.multiply(X.dtype == torch.float64, *left, *right, *sizes)


ZEN_5 = 26
"""Its family of processors, as CPUID numbers them."""


@functools.cache
def multiplies_itself() -> bool:
    """Whether our products are faster than the library's: MKL uses AVX2 on processors that are not
    Intel's. On Zen 5, whose units are 512 bits wide, that is half the rate of ours; on Zen 4 both
    reach the peak."""
    module = native.module()
    wide = module.isa() == "avx512" and module.amd_family >= ZEN_5
    return wide and torch.backends.mkl.is_available()


class Bfloat16Products:
    """Products of bfloat16 rows with float32 sums (csrc/cpu/bf16_gemm.cpp).

    Rows are packed once for each sweep: their transpose for the logits, themselves for the
    gradient, whose weights are rounded to bfloat16 tile by tile.
    """

    GROUP = 16

    def __init__(self, T: Tensor, A: Tensor, module: Any, split: int = 0) -> None:
        self.D = T.shape[1]
        self.starts = (0, split) if split else (0,)  # tiles begin at multiples of GROUP from here
        self.module, self.threads = module, torch.get_num_threads()
        # Rows in pairs of elements: an odd D gets a column of zeros.
        odd = self.D % 2
        self.sides = tuple((F.pad(X, (0, 1)) if odd else X).contiguous() for X in (T, A))
        self.width = self.D + self.D % 2
        self.packed: dict[tuple[int, int, bool], Tensor] = {}

    def pack(self, side: int, J: slice, transposed: bool) -> tuple[Tensor, int]:
        """The packed rows that J is among, and where J starts in them."""
        start = max(n for n in self.starts if n <= J.start)
        packed = self.packed.get((side, start, transposed))
        if packed is None:
            end = min((n for n in self.starts if n > start), default=len(self.sides[side]))
            X, N = self.sides[side][start:end], end - start
            columns, depth = (N, self.width) if transposed else (self.width, N)
            groups, pairs = -(-columns // self.GROUP), -(-depth // 2)
            packed = X.new_empty(groups, pairs, self.GROUP, 2)
            self.packed[side, start, transposed] = packed
            arguments = (X.data_ptr(), N, self.width, transposed)
            self.module.bf16_pack(*arguments, packed.data_ptr(), self.threads)
        return packed, J.start - start

    def logits(self, x: int, I: slice, y: int, J: slice, out: Tensor) -> None:
        packed, first = self.pack(y, J, transposed=True)
        X, Y = self.sides[x][I], packed[first // self.GROUP :]
        self.multiply(X, self.width, Y, out, accumulate=False)

    def accumulate(self, out: Tensor, W: Tensor, y: int, J: slice) -> None:
        rows, depth = W.shape
        transposed = not W.is_contiguous()
        stored = W.t() if transposed else W
        rounded = W.new_empty(rows, depth + depth % 2, dtype=torch.bfloat16)
        arguments = (stored.data_ptr(), *stored.shape, transposed)
        self.module.bf16_convert(*arguments, rounded.data_ptr(), self.threads)
        packed, first = self.pack(y, J, transposed=False)
        Y = packed[:, first // 2 :]
        self.multiply(rounded, depth + depth % 2, Y, out, accumulate=True)

    def multiply(self, X: Tensor, K: int, Y: Tensor, out: Tensor, accumulate: bool) -> None:
        """out (M, N) (+)= X (M, K) times packed Y."""
        M, N = out.shape
        left, right = (X.data_ptr(), X.stride(0)), (Y.data_ptr(), Y.stride(0))
        sizes = (M, N, K, accumulate, self.threads)
        self.module.bf16_multiply(*left, *right, out.data_ptr(), out.stride(0), *sizes)


@functools.cache
def accumulates_in_place(device: torch.device) -> bool:
    """Whether the library adds products of bfloat16 to float32 without a copy: older versions of
    PyTorch want a summand in the factors' dtype."""
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    X = out.to(torch.bfloat16)
    try:
        torch.addmm(out, X, X, out_dtype=torch.float32, out=out)
    except RuntimeError:
        return False
    return True


class DeviceProducts:
    """Products in the embeddings' own dtype, on the tensor cores, with float32 results.

    CPU tensors (in Triton's interpreter) are raised to float32, and weights rounded to the dtype.
    Meta tensors are not multiplied: the library's own memory is not counted.
    """

    def __init__(self, T: Tensor, A: Tensor) -> None:
        self.sides = (T, A)
        self.wide = T.dtype == torch.float32
        self.on_cpu = T.device.type == "cpu"

    def logits(self, x: int, I: slice, y: int, J: slice, out: Tensor) -> None:
        if out.is_meta:
            return
        X, Y = rows(self.sides[x], I), rows(self.sides[y], J).t()
        if self.wide:
            torch.mm(X, Y, out=out)  # [I, D] @ [D, J]
        elif self.on_cpu:
            torch.mm(X.float(), Y.float(), out=out)
        else:
            torch.mm(X, Y, out_dtype=torch.float32, out=out)

    def accumulate(self, out: Tensor, W: Tensor, y: int, J: slice) -> None:
        if out.is_meta:
            return
        Y = rows(self.sides[y], J)
        if self.wide:
            out.addmm_(W, Y)  # [., J] @ [J, D]
        elif self.on_cpu:
            out.addmm_(W.to(Y.dtype).float(), Y.float())
        elif accumulates_in_place(out.device):
            torch.addmm(out, W, Y, out_dtype=torch.float32, out=out)
        else:
            out += torch.mm(W, Y, out_dtype=torch.float32)


def rounds_to_bfloat16() -> bool:
    """Whether bfloat16 inputs take bfloat16 products, whose weights are rounded (MATH.md)."""
    return bool(native.module().bf16_products)
