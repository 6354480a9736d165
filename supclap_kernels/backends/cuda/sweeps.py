"""The sweeps of the CUDA backend, tile pair by tile pair: panels between library products, or (on
Hopper) one kernel for the products and what follows them, whose logits never leave the chip."""

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...options import Options
from ..call import Tensors
from ..device import DeviceBackend
from ..device_call import DeviceCall, Scratch
from ..panel import Tile

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CudaArguments:
    """A call as csrc/cuda/problem.h describes it: `problem`, and the tensors it came with."""

    def __init__(self, inputs: Tensors, options: Options, mode: int, width: int) -> None:
        self.inputs, self.native = inputs, native.cuda()
        if inputs.audio.is_meta:
            self.native = native.Unlaunched(self.native)
        self.alive: list[Tensor] = []
        audio, text, radius, scale, bias, ids, weight = inputs
        N, D = audio.shape
        self.problem = self.native.CudaProblem(
            N, D, width, DTYPES[audio.dtype], mode, options.infonce,
            options.renormalize, options.normalize, options.stats,
            radius is not None and radius.ndim == 1, options.alpha, options.beta,
            1.0 / N if options.reduction == "mean" else 1.0,
            text.data_ptr(), *text.stride(), audio.data_ptr(), *audio.stride(),
            self.kept(radius), self.kept(scale), self.kept(bias), self.kept(weight),
            self.kept(ids, torch.int64),
        )  # fmt: skip

    def kept(self, x: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        """The address of numbers as the kernels read them, alive until these are launched."""
        if x is None:
            return 0
        if x.dtype != dtype or not x.is_contiguous():
            x = x.to(dtype).contiguous()
        self.alive.append(x)
        return x.data_ptr()

    def set(self, **tensors: Tensor | None) -> None:
        self.problem.give(**{name: native.address(x) for name, x in tensors.items()})


class CudaCall(DeviceCall):
    """A call that launches kernels of csrc/cuda."""

    @staticmethod
    def weights_dtype(dtype: torch.dtype) -> torch.dtype:
        return dtype

    def slots(self, ni: int, nj: int, weights: bool) -> tuple[int, int]:
        rows, columns = self.native.PANEL_BLOCK
        return -(-nj // columns), -(-ni // rows)

    def prepare_launches(self) -> None:
        self.arguments = CudaArguments(self.inputs, self.options, self.mode, self.width)
        self.native, self.problem = self.arguments.native, self.arguments.problem
        self.set = self.arguments.set
        self.problem.split = self.split
        self.stream = native.stream(self.device)
        self.literal: tuple[Tensor, Tensor] | None = None

    def pack_rows(self, X: Tensor, out: Tensor) -> None:
        text = X is self.inputs.text
        self.set(**{"T" if text else "A": out})
        self.native.pack_rows(self.problem, text, self.stream)

    def start_call(self) -> None:
        """Before the first launch that reads the operands."""
        self.set(T=self.T, A=self.A, state=self.state)

    def prepare_state(self) -> None:
        self.start_call()
        self.set(running=self.running)
        self.native.prepare_rows(self.problem, self.stream)

    def place(self, tile: Tile, panel: Tensor | None, scratch: Scratch) -> tuple[Any, ...]:
        where = (tile.i0, tile.ni, tile.j0, tile.nj, tile.ld, tile.size)
        start = 0 if panel is None else panel.data_ptr()
        stream = native.stream(self.device)  # of this lane
        return (self.problem, *where, start, *map(native.address, scratch[1:]), stream)

    def launch_tile(self, tile: Tile, panel: Tensor | None, scratch: Scratch) -> None:
        self.native.panel_tile(*self.place(tile, panel, scratch))

    def merge_tile(self, tile: Tile, scratch: Scratch) -> None:
        self.native.panel_merge(*self.place(tile, None, scratch))

    def literal_rows(self) -> tuple[int, int]:
        """Which rows are literal, listed on the device: addresses of the list and of its length."""
        if self.literal is None:
            integers: dict[str, Any] = {"dtype": torch.int32, "device": self.device}
            self.literal = torch.empty(self.N, **integers), torch.empty(1, **integers)
            addresses = map(native.address, self.literal)
            self.native.list_literal(self.problem, *addresses, self.stream)
        index, count = self.literal
        return index.data_ptr(), count.data_ptr()

    def literal_statistics(self) -> None:
        self.native.literal_statistics(self.problem, *self.literal_rows(), self.stream)

    def literal_gradients(self, dT: Tensor | None, dA: Tensor | None) -> None:
        self.set(dT=dT, dA=dA)
        self.native.literal_gradients(self.problem, *self.literal_rows(), self.stream)

    def finish_rows(self, rows: Tensor, terms: Tensor | None) -> None:
        self.set(row_loss=rows, terms=terms)
        self.native.finish_statistics(self.problem, self.stream)

    def prepare_factors(self, upstream: Tensor | None) -> None:
        self.start_call()
        self.problem.per_row_upstream = upstream is not None and upstream.ndim == 1
        self.problem.upstream = self.arguments.kept(upstream)
        bounds = self.new_empty(3, -(-self.N // self.native.THREADS))
        self.set(omega=self.omega, bounds=bounds)
        self.set(factors=self.factors, unit=self.unit, sums=self.sums)
        self.native.start_gradients(self.problem, self.stream)

    def finish_towers(
        self, dT: Tensor | None, dA: Tensor | None, text: Tensor | None, audio: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, radius, totals = self.new_empty(2, self.N), self.new_empty(self.N), self.new_empty(3)
        counter = torch.zeros(1, dtype=torch.int32, device=self.device)
        outputs = [x for x in (text, audio) if x is not None]
        self.problem.out_single = any(x.dtype == torch.float32 for x in outputs)
        self.set(dT=dT, dA=dA, out_text=text, out_audio=audio, counter=counter)
        self.set(row_scalars=rows, row_radius=radius)
        self.set(out_scale=totals[0], out_bias=totals[1], out_radius=totals[2])
        self.native.finish_gradients(self.problem, self.stream)
        return radius, totals


class HopperCall(CudaCall):
    """A call whose tile pairs leave no logits."""

    def launch_tile(self, tile: Tile, panel: Tensor | None, scratch: Scratch) -> None:
        self.native.hopper_tile(*self.place(tile, None, scratch))


PANEL = DeviceBackend(CudaCall, fused=False)
HOPPER = DeviceBackend(HopperCall, fused=True)
