"""The "cuda" backend: the whole loss in one launch where its tiles fit on the chip (csrc/cuda/
single), else the panel engine.

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
from .contract import Inputs
from .gpu_call import similarity_of
from .gpu_cuda import CUDA_PANEL, DTYPES, Given
from .gpu_hopper import HOPPER
from .panel import PLACEHOLDER
from .state import PLAIN, ROW_SUMS, STATE_ROWS

SIDE = 0
"""Of the tiles: 16, 32, 64, or by the size of the batch (csrc/cuda/single/plan.cu)."""


def width_of(D: int, dtype: torch.dtype) -> int:
    """Rows of whole 16 bytes."""
    size = 16 // dtype.itemsize
    return -(-D // size) * size


@functools.cache
def limit(D: int, dtype: torch.dtype, mode: int, infonce: bool, index: int, side: int) -> int:
    """The largest batch whose tiles fit on the chip of the device `index`, the current one."""
    module = native.cuda()
    p = module.CudaProblem()
    p.width, p.dtype, p.mode, p.infonce = width_of(D, dtype), DTYPES[dtype], mode, infonce
    return int(module.single_limit(p, side))


def limit_of(D: int, dtype: torch.dtype, has_radius: bool, options: Options) -> int:
    mode, index = contract.mode(has_radius, options), native.current_device()
    return limit(D, dtype, mode, options.infonce, index, SIDE)


def larger(dtype: torch.dtype, has_radius: bool, options: Options) -> Backend:
    """What computes batches that do not fit: where an H200 measured it, the fastest."""
    if gpu_hopper.takes(dtype, has_radius, options):
        return HOPPER
    plain = options.infonce and contract.mode(has_radius, options) == PLAIN
    if gpu_hopper.WANTED and plain and dtype != torch.float32 and dispatch.triton_state() == "ok":
        return dispatch.implementation("triton")
    return CUDA_PANEL


def larger_of(inputs: Inputs, options: Options) -> Backend:
    return larger(inputs.audio.dtype, inputs.radius is not None, options)


def sums_elements(N: Any, width: int) -> Any:
    """Length of the buffer in which a launch leaves what backward needs for the gradients."""
    return 2 * N * width + (ROW_SUMS + 1) * N + 2


def give_sums(given: Given, buffer: Tensor, needs: tuple[bool, ...]) -> None:
    """The parts of that buffer, by their addresses."""
    N, width = given.problem.N, given.problem.width
    dT = buffer.data_ptr()
    dA = dT + 4 * N * width
    sums = dA + 4 * N * width
    omega = sums + 4 * ROW_SUMS * N
    unit = omega + 4 * N
    given.problem.give(
        dT=dT if needs[1] else 0, dA=dA if needs[0] else 0,
        sums=sums, omega=omega, unit=unit, counter=unit + 4,
    )  # fmt: skip


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
        single = sums_elements(N, width_of(D, dtype))
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
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        given = self.given(inputs, options)
        if given is None:
            return larger_of(inputs, options).forward(inputs, options, needs)
        per_row = options.reduction == "none"
        N, width = len(inputs.audio), given.problem.width
        gradient = any(needs) and not per_row
        state = torch.empty(STATE_ROWS, N, dtype=torch.float32, device=inputs.audio.device)
        loss = state.new_empty(N if per_row else ())
        saved = state.new_empty(sums_elements(N, width) if gradient else PLACEHOLDER)
        if gradient:
            give_sums(given, saved, needs)
        else:
            saved.zero_()  # no output is undefined
        terms = state.new_empty(6, N) if options.stats else None
        similarity = state.new_empty(2, N) if options.stats else None
        rows = loss if per_row else None
        given.set(state=state, row_loss=rows, terms=terms, similarity=similarity)
        launch(given, None if per_row else loss, gradient)
        if terms is None or similarity is None:
            return loss, None, state, saved
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
    ) -> tuple[Tensor | None, ...]:
        given = self.given(inputs, options)
        if given is None:
            panel = larger_of(inputs, options)
            return panel.backward(inputs, options, needs, upstream, state, saved)
        address = given.kept(upstream)
        if options.reduction == "none":
            N = len(inputs.audio)
            saved = state.new_empty(sums_elements(N, given.problem.width))
            state, rows = torch.empty_like(state), state.new_empty(N)
            given.problem.per_row_upstream, given.problem.stats = True, False
            given.problem.upstream = address
            given.set(state=state, row_loss=rows)
            give_sums(given, saved, needs)
            launch(given, None, True)
        else:
            given.problem.give(after=address, state=state.data_ptr())
            give_sums(given, saved, needs)
        return self.finish(given, needs)

    def finish(self, given: Given, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """The launch of backward. Gradients of numbers come out in float32."""
        like, p = given.inputs[:5], given.problem
        rows = torch.empty(3, p.N, dtype=torch.float32, device=like[0].device)
        out = [
            None
            if not need or x is None
            else torch.empty_like(x, memory_format=torch.contiguous_format)
            if n < 2
            else rows.new_empty(x.shape)
            for n, (x, need) in enumerate(zip(like, needs, strict=True))
        ]
        audio, text, radius, scale, bias = out
        given.set(out_audio=audio, out_text=text, out_scale=scale, out_bias=bias, row_scalars=rows)
        if p.per_row_radius and radius is not None:
            given.set(row_radius=radius)
        else:
            of_rows = rows.data_ptr() + 2 * rows.stride(0) * rows.itemsize
            p.give(row_radius=of_rows, out_radius=native.address(radius))
        given.native.finish_gradients(p, native.stream(rows.device))
        return tuple(
            value if value is None or x is None or value.dtype == x.dtype else value.to(x.dtype)
            for value, x in zip(out, like, strict=True)
        )

    def memory(self, N: int, D: int, dtype: torch.dtype, has_radius: bool, options: Options) -> int:
        """Bytes at the peak of forward and backward, beyond the inputs and the returned
        gradients."""
        if N > limit_of(D, dtype, has_radius, options):
            return larger(dtype, has_radius, options).memory(N, D, dtype, has_radius, options)
        module, width = native.cuda(), width_of(D, dtype)
        p = module.CudaProblem()
        p.N, p.D, p.width, p.dtype, p.infonce = N, D, width, DTYPES[dtype], options.infonce
        p.mode, p.normalize = contract.mode(has_radius, options), options.normalize
        p.text_n = p.audio_n = width
        p.text_d = p.audio_d = 1
        scratch = int(module.plan_single(p, True, SIDE).scratch)
        state, sums = 4 * STATE_ROWS * N, 4 * sums_elements(N, width)
        returned, rows = 2 * N * D * dtype.itemsize, 4 * 3 * N
        if options.reduction == "none":  # the loss alone, and in backward everything again
            return 2 * state + sums + 4 * N + max(scratch, returned + rows) - returned
        return state + sums + max(scratch, returned + rows) - returned


CUDA = Single()
