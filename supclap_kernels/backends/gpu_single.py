"""The "cuda" backend: the whole loss in one launch where its tiles fit on the chip (csrc/cuda/
single.cuh), else the panel engine.

The launch that computes the loss also computes the gradients, for an upstream gradient of 1, if any
is wanted; backward is one small launch that applies the upstream gradient and casts. With
reduction="none" the upstream gradient is a weight of each row, so backward launches the kernel
again with it.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, native
from ..options import Options
from . import contract, gpu_hopper
from .backend import Backend, Call
from .contract import STATE_ROWS, Inputs
from .gpu_call import SUMS, similarity_of
from .gpu_cuda import CUDA_PANEL, DTYPES, Given
from .gpu_hopper import HOPPER
from .panel import PLACEHOLDER

SIDE = 0
"""Of the tiles: 16, 32, 64, or by the size of the batch (csrc/cuda/single.cu)."""


def width_of(D: int, dtype: torch.dtype) -> int:
    """Rows of whole 16 bytes."""
    size = 16 // dtype.itemsize
    return -(-D // size) * size


@functools.cache
def limit(D: int, dtype: torch.dtype, mode: int, infonce: bool, index: int) -> int:
    """The largest batch whose tiles fit on the chip of the device `index`, the current one."""
    module = native.cuda()
    p = module.Problem()
    p.width, p.dtype, p.mode, p.infonce = width_of(D, dtype), DTYPES[dtype], mode, infonce
    return int(module.single_limit(p, SIDE))


def limit_of(D: int, dtype: torch.dtype, has_radius: bool, options: Options) -> int:
    index = torch.cuda.current_device() if torch.cuda.is_available() else -1
    return limit(D, dtype, contract.mode(has_radius, options), options.infonce, index)


def larger(dtype: torch.dtype, has_radius: bool, options: Options) -> Backend:
    """What computes batches that do not fit: where an H200 measured it, the fastest."""
    if gpu_hopper.takes(dtype, has_radius, options):
        return HOPPER
    plain = options.infonce and contract.mode(has_radius, options) == contract.NONE
    if gpu_hopper.WANTED and plain and dtype != torch.float32 and dispatch.triton_state() == "ok":
        return dispatch.implementation("triton")
    return CUDA_PANEL


def larger_of(inputs: Inputs, options: Options) -> Backend:
    return larger(inputs.audio.dtype, inputs.radius is not None, options)


class Sums:
    """What a launch leaves for the gradients: parts of one buffer, by their addresses."""

    PARTS = ("dT", "dA", "sums", "omega", "unit", "counter")

    def __init__(self, buffer: Tensor, N: int, width: int) -> None:
        self.at, start = [], buffer.data_ptr()
        for size in (N * width, N * width, (SUMS + 1) * N, N, 1, 1):
            self.at.append(start)
            start += 4 * size

    @staticmethod
    def size(N: Any, width: int) -> Any:
        return 2 * N * width + (SUMS + 2) * N + 2

    def give(self, given: Given, needs: tuple[bool, ...]) -> None:
        for name, address in zip(self.PARTS, self.at, strict=True):
            setattr(given.problem, name, address)
        if not needs[1]:
            given.problem.dT = 0
        if not needs[0]:
            given.problem.dA = 0


def launch(given: Given, loss: Tensor | None, gradient: bool) -> Tensor:
    """One cooperative launch; returns its working memory."""
    audio = given.inputs.audio
    plan = given.native.plan_single(given.problem, gradient, SIDE)
    scratch = torch.empty(plan.scratch, dtype=torch.uint8, device=audio.device)
    given.native.single(
        given.problem, plan, scratch.data_ptr(), native.address(loss), gradient,
        native.stream(audio.device),
    )  # fmt: skip
    return scratch


class Single(Backend):
    """One launch where the batch fits, else another backend."""

    def saved_elements(
        self, N: Any, D: int, dtype: torch.dtype, has_radius: bool, options: Options, keep: bool
    ) -> Any:
        if not keep:
            return PLACEHOLDER
        panel = larger(dtype, has_radius, options).saved_elements(
            N, D, dtype, has_radius, options, keep
        )
        single = Sums.size(N, width_of(D, dtype))
        if options.reduction == "none":
            single = PLACEHOLDER
        fits = torch.sym_min(1, limit_of(D, dtype, has_radius, options) // N)
        return fits * single + (1 - fits) * panel

    def call(
        self, inputs: Inputs, options: Options, state: Tensor | None = None, split: int = 0
    ) -> Call:
        """Stage by stage it is never one launch."""
        return larger_of(inputs, options).call(inputs, options, state, split)

    def given(self, inputs: Inputs, options: Options) -> Given | None:
        """The call as the kernel takes it, or None if it is one for the panel engine."""
        (N, D), has_radius = inputs.audio.shape, inputs.radius is not None
        if N > limit_of(D, inputs.audio.dtype, has_radius, options):
            return None
        mode = contract.mode(has_radius, options)
        return Given(inputs, options, mode, width_of(D, inputs.audio.dtype))

    def forward(
        self, inputs: Inputs, options: Options, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        given = self.given(inputs, options)
        if given is None:
            return larger_of(inputs, options).forward(inputs, options, needs)
        per_row = options.reduction == "none"
        N, width = len(inputs.audio), given.problem.width
        gradient = any(needs) and not per_row
        empty = functools.partial(torch.empty, dtype=torch.float32, device=inputs.audio.device)
        state, loss = empty(STATE_ROWS, N), empty((N,) if per_row else ())
        saved = empty(Sums.size(N, width) if gradient else PLACEHOLDER)
        if gradient:
            Sums(saved, N, width).give(given, needs)
        else:
            saved.zero_()  # no output is undefined
        stats = (empty(6, N), empty(2, N)) if options.stats else (None, None)
        given.set(terms=stats[0], similarity=stats[1])
        given.set(state=state, row_loss=loss if per_row else None)
        launch(given, None if per_row else loss, gradient)
        terms, similarity = stats
        if terms is None or similarity is None:
            return loss, empty(0), state, saved
        values = contract.row_values(inputs, terms, state)
        found = contract.statistics(values, N, similarity_of(similarity, inputs.scale))
        return loss, found.to(loss.dtype), state, saved

    def backward(
        self,
        inputs: Inputs,
        options: Options,
        needs: tuple[bool, ...],
        upstream: Tensor,
        state: Tensor,
        saved: Tensor,
    ) -> tuple[Tensor, ...]:
        given = self.given(inputs, options)
        if given is None:
            panel = larger_of(inputs, options)
            return panel.backward(inputs, options, needs, upstream, state, saved)
        N, width = len(inputs.audio), given.problem.width
        if options.reduction == "none":
            saved = state.new_empty(Sums.size(N, width))
            state, rows = torch.empty_like(state), state.new_empty(N)
            given.problem.per_row_upstream = True
            given.problem.stats = False
            given.numbers(upstream=upstream)
            given.set(state=state, row_loss=rows)
            Sums(saved, N, width).give(given, needs)
            launch(given, None, True)
        else:
            given.numbers(after=upstream)
            given.set(state=state)
            Sums(saved, N, width).give(given, needs)
        return self.finish(given, needs)

    def finish(self, given: Given, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
        """The launch of backward. Gradients of numbers come out in float32."""
        like, p = given.inputs[:5], given.problem
        out = [
            torch.empty(x.shape, dtype=x.dtype if n < 2 else torch.float32, device=x.device)
            if need and x is not None
            else None
            for n, (x, need) in enumerate(zip(like, needs, strict=True))
        ]
        audio, text, radius, scale, bias = out
        rows = torch.empty(3, p.N, dtype=torch.float32, device=given.inputs.audio.device)
        given.set(out_audio=audio, out_text=text, out_scale=scale, out_bias=bias, row_scalars=rows)
        if p.per_row_radius and radius is not None:
            given.set(row_radius=radius)
        else:
            given.set(row_radius=rows[2], out_radius=radius)
        given.native.finish_gradients(p, native.stream(rows.device))
        return tuple(
            rows.new_empty(0)
            if value is None or x is None
            else value
            if value.dtype == x.dtype
            else value.to(x.dtype)
            for value, x in zip(out, like, strict=True)
        )

    def memory(self, N: int, D: int, dtype: torch.dtype, has_radius: bool, options: Options) -> int:
        """Bytes at the peak of forward and backward, beyond the inputs and the returned
        gradients."""
        if N > limit_of(D, dtype, has_radius, options):
            return larger(dtype, has_radius, options).memory(N, D, dtype, has_radius, options)
        module, width = native.cuda(), width_of(D, dtype)
        p = module.Problem()
        p.N, p.D, p.width, p.dtype, p.infonce = N, D, width, DTYPES[dtype], options.infonce
        p.mode, p.normalize = contract.mode(has_radius, options), options.normalize
        p.text_n = p.audio_n = width
        p.text_d = p.audio_d = 1
        scratch = int(module.plan_single(p, True, SIDE).scratch)
        state, sums = 4 * STATE_ROWS * N, 4 * Sums.size(N, width)
        returned, rows = 2 * N * D * dtype.itemsize, 4 * 3 * N
        if options.reduction == "none":  # the loss alone, and in backward everything again
            return 2 * state + sums + 4 * N + max(scratch, returned + rows) - returned
        return state + sums + max(scratch, returned + rows) - returned


CUDA = Single()
