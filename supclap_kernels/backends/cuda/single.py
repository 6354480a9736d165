"""The whole loss in one launch, where its tiles fit on the chip (csrc/cuda/single).

The launch that computes the loss also computes the gradients, for an upstream gradient of 1, if any
is wanted; backward is one small launch that applies the upstream gradient and casts. With
reduction="none" the upstream gradient is a weight of each row, so backward launches the kernel
again with it.
"""

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...options import Options
from .. import statistics
from ..call import Backend, Tensors, cast_like
from ..device_call import similarity_of
from ..panel import PLACEHOLDER
from ..state import ROW_SUMS, STATE_ROWS
from .sweeps import DTYPES, CudaArguments


def width_of(D: int, dtype: torch.dtype) -> int:
    """Rows of whole 16 bytes."""
    size = 16 // dtype.itemsize
    return -(-D // size) * size


def side_of(way: str) -> int:
    """Of the tiles that a way names, such as cuda:single:32; 0: by the size of the batch."""
    return int(way.removeprefix("cuda:single").lstrip(":") or 0)


def limit(
    D: int,
    dtype: torch.dtype,
    mode: int,
    infonce: bool,
    index: int = -1,
    side: int = 0,
    chip: tuple[int, int] | None = None,
) -> int:
    """The largest batch whose tiles of `side` (0: any side) fit on the chip of the device `index`
    (-1: there is none, the kernels run on the host), or on one that is only described, by its
    multiprocessors and its bytes of shared memory for a block."""
    module = native.cuda()
    p = module.CudaProblem()
    p.width, p.dtype, p.mode, p.infonce = width_of(D, dtype), DTYPES[dtype], mode, infonce
    if chip is not None:
        return int(module.single_limit(p, side, *chip))
    if index < 0:
        return int(module.single_limit(p, side))
    with torch.cuda.device(index):
        return int(module.single_limit(p, side))


def sums_elements(N: Any, width: int) -> Any:
    """Length of the buffer in which a launch leaves what backward needs for the gradients."""
    return 2 * N * width + (ROW_SUMS + 1) * N + 2


class Single(Backend):
    """One launch, in tiles of `side` x `side` pairs (0: by the size of the batch)."""

    def __init__(self, side: int = 0) -> None:
        self.side = side

    def saved_elements(
        self, N: Any, D: int, dtype: torch.dtype, has_radius: bool, options: Options, keep: bool
    ) -> Any:
        if not keep or options.reduction == "none":
            return PLACEHOLDER
        return sums_elements(N, width_of(D, dtype))

    def arguments(self, inputs: Tensors, options: Options) -> CudaArguments:
        D, dtype = inputs.audio.shape[1], inputs.audio.dtype
        mode = options.mode(inputs.radius is not None)
        return CudaArguments(inputs, options, mode, width_of(D, dtype))

    def launch(self, arguments: CudaArguments, loss: Tensor | None, gradient: bool) -> Tensor:
        """One cooperative launch; returns its working memory."""
        device = arguments.inputs.audio.device
        plan = arguments.native.plan_single(arguments.problem, gradient, self.side)
        scratch = torch.empty(plan.scratch, dtype=torch.uint8, device=device)
        arguments.native.single(
            arguments.problem, plan, scratch.data_ptr(), native.address(loss), gradient,
            native.stream(device),
        )  # fmt: skip
        return scratch

    def forward(
        self, inputs: Tensors, options: Options, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        arguments = self.arguments(inputs, options)
        per_row = options.reduction == "none"
        N, width = len(inputs.audio), arguments.problem.width
        gradient = any(needs) and not per_row
        state = torch.empty(STATE_ROWS, N, dtype=torch.float32, device=inputs.audio.device)
        loss = state.new_empty(N if per_row else ())
        saved = state.new_empty(sums_elements(N, width) if gradient else PLACEHOLDER)
        if gradient:
            give_sums(arguments, saved, needs)
        else:
            saved.zero_()  # no output is undefined
        terms = state.new_empty(6, N) if options.stats else None
        similarity = state.new_empty(2, N) if options.stats else None
        rows = loss if per_row else None
        arguments.set(state=state, row_loss=rows, terms=terms, similarity=similarity)
        self.launch(arguments, None if per_row else loss, gradient)
        if terms is None or similarity is None:
            return loss, None, state, saved
        values = statistics.row_values(inputs.radius, inputs.weight, terms, state)
        means = statistics.means(values, N, similarity_of(similarity, inputs.scale))
        return loss, means.to(loss.dtype), state, saved

    def backward(
        self,
        inputs: Tensors,
        options: Options,
        needs: tuple[bool, ...],
        upstream: Tensor,
        state: Tensor,
        saved: Tensor,
    ) -> tuple[Tensor | None, ...]:
        arguments = self.arguments(inputs, options)
        address = arguments.kept(upstream)
        if options.reduction == "none":
            N = len(inputs.audio)
            saved = state.new_empty(sums_elements(N, arguments.problem.width))
            state, rows = torch.empty_like(state), state.new_empty(N)
            arguments.problem.per_row_upstream, arguments.problem.stats = True, False
            arguments.problem.upstream = address
            arguments.set(state=state, row_loss=rows)
            give_sums(arguments, saved, needs)
            self.launch(arguments, None, True)
        else:
            arguments.problem.give(after=address, state=state.data_ptr())
            give_sums(arguments, saved, needs)
        return finish(arguments, needs)


def give_sums(arguments: CudaArguments, buffer: Tensor, needs: tuple[bool, ...]) -> None:
    """The parts of the buffer of `sums_elements`, by their addresses."""
    N, width = arguments.problem.N, arguments.problem.width
    dT = buffer.data_ptr()
    dA = dT + 4 * N * width
    sums = dA + 4 * N * width
    omega = sums + 4 * ROW_SUMS * N
    unit = omega + 4 * N
    arguments.problem.give(
        dT=dT if needs[1] else 0, dA=dA if needs[0] else 0,
        sums=sums, omega=omega, unit=unit, counter=unit + 4,
    )  # fmt: skip


def finish(arguments: CudaArguments, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The launch of backward: gradients of audio, text, radius, scale, bias, or None. Those of
    numbers come out in float32."""
    sources, p = arguments.inputs[:5], arguments.problem
    rows = torch.empty(3, p.N, dtype=torch.float32, device=sources[0].device)
    gradients = [
        None
        if not need or x is None
        else torch.empty_like(x, memory_format=torch.contiguous_format)
        if n < 2
        else rows.new_empty(x.shape)
        for n, (x, need) in enumerate(zip(sources, needs, strict=True))
    ]
    audio, text, radius, scale, bias = gradients
    arguments.set(out_audio=audio, out_text=text, out_scale=scale, out_bias=bias, row_scalars=rows)
    if p.per_row_radius and radius is not None:
        arguments.set(row_radius=radius)
    else:
        of_rows = rows.data_ptr() + 2 * rows.stride(0) * rows.itemsize
        p.give(row_radius=of_rows, out_radius=native.address(radius))
    arguments.native.finish_gradients(p, native.stream(rows.device))
    return cast_like(gradients, arguments.inputs)
