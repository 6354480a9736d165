"""The GPU backends with the kernels of csrc/cuda: launches those of one call."""

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..options import Options
from .contract import Inputs
from .gpu import Backend
from .gpu_call import Call, Scratch, contiguous
from .panel import Tile

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Given:
    """A call as csrc/cuda/problem.h describes it: its numbers, and the tensors it came with."""

    def __init__(self, inputs: Inputs, options: Options, mode: int, width: int) -> None:
        self.inputs, self.native = inputs, native.cuda()
        p = self.problem = self.native.CudaProblem()
        audio, text, radius = inputs[:3]
        p.N, p.D = audio.shape
        p.width, p.dtype, p.mode, p.infonce = width, DTYPES[audio.dtype], mode, options.infonce
        p.renormalize, p.normalize, p.stats = options.renormalize, options.normalize, options.stats
        p.per_row_radius = radius is not None and radius.ndim == 1
        p.alpha, p.beta = options.alpha, options.beta
        p.row_scale = 1.0 / p.N if options.reduction == "mean" else 1.0
        p.text_n, p.text_d = text.stride()
        p.audio_n, p.audio_d = audio.stride()
        p.text, p.audio = text.data_ptr(), audio.data_ptr()
        self.alive: list[Tensor] = []
        self.numbers(radius=radius, scale=inputs.scale, bias=inputs.bias, weight=inputs.weight)
        ids = contiguous(inputs.ids)
        if ids is not None:
            self.alive.append(ids)
            p.ids = ids.data_ptr()

    def numbers(self, **tensors: Tensor | None) -> None:
        """Numbers as the kernels read them, kept alive until these are launched."""
        for name, x in tensors.items():
            if x is not None:
                x = x.float().contiguous()
                self.alive.append(x)
                setattr(self.problem, name, x.data_ptr())

    def set(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            setattr(self.problem, name, native.address(tensor))


class CudaKernels:
    """`Kernels` of gpu_call.py, and (the static methods) `Engine` of gpu.py."""

    @staticmethod
    def weights_dtype(dtype: torch.dtype) -> torch.dtype:
        return dtype

    @staticmethod
    def slots_for(
        ni: int, nj: int, fused: bool, weights: bool, grams: int, infonce: bool, dtype: torch.dtype
    ) -> tuple[int, int]:
        rows, columns = native.cuda().PANEL_BLOCK
        return -(-nj // columns), -(-ni // rows)

    @staticmethod
    def far_bytes(N: int, width: int) -> int:
        return 4 * N

    def __init__(self, call: Call) -> None:
        self.call = call
        self.given = Given(call.inputs, call.options, call.mode, call.width)
        self.native, self.problem, self.set = self.given.native, self.given.problem, self.given.set
        self.stream = native.stream(call.device)
        self.far: tuple[Tensor, Tensor] | None = None

    def slots(self, ni: int, nj: int, weights: bool) -> tuple[int, int]:
        call = self.call
        return self.slots_for(ni, nj, False, weights, call.grams, call.infonce, call.dtype)

    def pack(self, X: Tensor, out: Tensor) -> None:
        text = X is self.call.inputs.text
        self.set(**{"T" if text else "A": out})
        self.native.pack_rows(self.problem, text, self.stream)

    def start_call(self) -> None:
        """Before the first launch that reads the operands."""
        self.set(T=self.call.T, A=self.call.A, state=self.call.state)

    def prepare_rows(self) -> None:
        self.start_call()
        self.set(running=self.call.running)
        self.native.cuda_prepare_rows(self.problem, self.stream)

    def place(self, tile: Tile, panel: Tensor | None, scratch: Scratch) -> tuple[Any, ...]:
        where = (tile.i0, tile.ni, tile.j0, tile.nj, tile.ld, tile.size)
        start = 0 if panel is None else panel.data_ptr()
        stream = native.stream(self.call.device)  # of this lane
        return (self.problem, *where, start, *map(native.address, scratch[1:]), stream)

    def tile(self, tile: Tile, panel: Tensor | None, scratch: Scratch) -> None:
        self.native.panel_tile(*self.place(tile, panel, scratch))

    def merge(self, tile: Tile, scratch: Scratch) -> None:
        self.native.panel_merge(*self.place(tile, None, scratch))

    def far_rows(self) -> tuple[int, int]:
        """Which rows are far, listed on the device: addresses of the list and of its length."""
        if self.far is None:
            integers: dict[str, Any] = {"dtype": torch.int32, "device": self.call.device}
            self.far = torch.empty(self.call.N, **integers), torch.empty(1, **integers)
            addresses = map(native.address, self.far)
            self.native.far_list(self.problem, *addresses, self.stream)
        index, count = self.far
        return index.data_ptr(), count.data_ptr()

    def far_statistics(self) -> None:
        self.native.far_statistics(self.problem, *self.far_rows(), self.stream)

    def far_gradients(self, dT: Tensor | None, dA: Tensor | None) -> None:
        self.set(dT=dT, dA=dA)
        self.native.far_gradients(self.problem, *self.far_rows(), self.stream)

    def finish_statistics(self, rows: Tensor, terms: Tensor | None) -> None:
        self.set(row_loss=rows, terms=terms)
        self.native.cuda_finish_statistics(self.problem, self.stream)

    def start_gradients(self, upstream: Tensor | None) -> None:
        call = self.call
        self.start_call()
        self.problem.per_row_upstream = upstream is not None and upstream.ndim == 1
        self.given.numbers(upstream=upstream)
        bounds = call.new_empty(2, -(-call.N // self.native.THREADS))
        self.set(omega=call.omega, bounds=bounds)
        self.set(factors=call.factors, unit=call.unit, sums=call.sums)
        self.native.cuda_start_gradients(self.problem, self.stream)

    def finish_gradients(
        self, dT: Tensor | None, dA: Tensor | None, text: Tensor | None, audio: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        call = self.call
        rows, radius, totals = call.new_empty(2, call.N), call.new_empty(call.N), call.new_empty(3)
        counter = torch.zeros(1, dtype=torch.int32, device=call.device)
        given = [x for x in (text, audio) if x is not None]
        self.problem.out_single = any(x.dtype == torch.float32 for x in given)
        self.set(dT=dT, dA=dA, out_text=text, out_audio=audio, counter=counter)
        self.set(row_scalars=rows, row_radius=radius)
        self.set(out_scale=totals[0], out_bias=totals[1], out_radius=totals[2])
        self.native.cuda_finish_gradients(self.problem, self.stream)
        return radius, totals


CUDA_PANEL = Backend(CudaKernels, fused=False)
