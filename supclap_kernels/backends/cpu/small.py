"""A small batch on a CPU: the whole pass is one native call (csrc/cpu/small.h).

Forward computes the gradients, too, for an upstream gradient of 1, if any is wanted; backward
multiplies them by what arrives. With reduction="none" the upstream gradient is a weight of each
row, so backward is the whole pass again. 16-bit embeddings are widened first.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...options import Options
from ...reference import accumulator_dtype
from .. import statistics
from ..call import Backend, Tensors, cast_like, gradient_elements
from ..panel import PLACEHOLDER
from ..state import STATE_ROWS
from .call import native_problem


@functools.lru_cache(maxsize=256)
def plan(
    N: int, D: int, dtype: torch.dtype, dimensions: int | None, options: Options, threads: int
) -> tuple[Any, int]:
    """The native problem and the bytes of its working memory, remembered from step to step."""
    p = native_problem(N, D, dtype, dimensions, options)
    p.threads = threads
    return p, native.module().small_bytes(p, options.normalize)


def plan_of(inputs: Tensors, options: Options) -> tuple[Any, int]:
    N, D = inputs.audio.shape
    dimensions = None if inputs.radius is None else inputs.radius.ndim
    dtype = accumulator_dtype(inputs.audio.dtype)
    return plan(N, D, dtype, dimensions, options, torch.get_num_threads())


def native_for(x: Tensor) -> Any:
    return native.Unlaunched(native.module()) if x.is_meta else native.module()


class Small(Backend):
    def saved_elements(
        self, N: Any, D: int, dtype: torch.dtype, has_radius: bool, options: Options, keep: bool
    ) -> Any:
        keeps = keep and options.reduction != "none"
        return gradient_elements(N, D) if keeps else PLACEHOLDER

    def forward(
        self, inputs: Tensors, options: Options, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        audio = inputs.audio
        N, D = audio.shape
        per_row = options.reduction == "none"
        gradient = True in needs and not per_row
        state = audio.new_empty((STATE_ROWS, N), dtype=accumulator_dtype(audio.dtype))
        loss = state.new_empty((N,) if per_row else ())
        saved = state.new_empty(gradient_elements(N, D) if gradient else PLACEHOLDER)
        if not (gradient and needs[0] and needs[1]):
            saved.zero_()  # no output is undefined
        kept = saved if gradient else None
        if not options.stats:
            small_pass(inputs, options, needs, state, loss, kept)
            return loss, None, state, saved
        terms = state.new_empty((6, N), dtype=torch.float64)
        similarity = state.new_empty(2, dtype=torch.float64)
        small_pass(inputs, options, needs, state, loss, kept, None, terms, similarity)
        values = statistics.row_values(inputs.radius, inputs.weight, terms, state)
        return loss, statistics.means(values, N, similarity).to(loss.dtype), state, saved

    def backward(
        self,
        inputs: Tensors,
        options: Options,
        needs: tuple[bool, ...],
        upstream: Tensor,
        state: Tensor,
        saved: Tensor,
    ) -> tuple[Tensor | None, ...]:
        if options.reduction == "none":
            N, D = inputs.audio.shape
            saved, loss = state.new_empty(gradient_elements(N, D)), state.new_empty(N)
            rows = plain(upstream, state.dtype)
            small_pass(inputs, options, needs, torch.empty_like(state), loss, saved, rows)
            upstream = state.new_ones(())
        gradients = [
            state.new_empty(x.shape) if need and x is not None else None
            for x, need in zip(inputs[:5], needs, strict=True)
        ]
        addresses = [0 if g is None else g.data_ptr() for g in gradients]
        upstream = plain(upstream, state.dtype)
        native_for(state).scale_gradients(
            plan_of(inputs, options)[0], saved.data_ptr(), upstream.data_ptr(), *addresses
        )
        return cast_like(gradients, inputs)


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the kernels read it."""
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def small_pass(
    inputs: Tensors,
    options: Options,
    needs: tuple[bool, ...],
    state: Tensor,
    loss: Tensor,
    kept: Tensor | None,
    upstream: Tensor | None = None,
    terms: Tensor | None = None,
    similarity: Tensor | None = None,
) -> None:
    """The native call: fills state, loss, terms, similarity, and `kept` with the gradients."""
    p, size = plan_of(inputs, options)
    dtype, (audio, text, radius, scale, bias, ids, weight) = state.dtype, inputs
    audio, text, scale = plain(audio, dtype), plain(text, dtype), plain(scale, dtype)
    radius = None if radius is None else plain(radius, dtype)
    bias = None if bias is None else plain(bias, dtype)
    weight = None if weight is None else plain(weight, dtype)
    ids = None if ids is None else ids.contiguous()
    memory = state.new_empty(size, dtype=torch.uint8)
    dA = dT = dR = scalars = 0
    if kept is not None:
        N, width, address = p.N, p.N * p.D * state.itemsize, kept.data_ptr()
        dA, dT = address if needs[0] else 0, address + width if needs[1] else 0
        dR = address + 2 * width
        scalars = dR + N * state.itemsize
    optional = (radius, scale, bias, ids, weight, upstream)
    addresses = [0 if x is None else x.data_ptr() for x in optional]
    native_for(state).small_pass(
        p, options.normalize, text.data_ptr(), audio.data_ptr(), *addresses, state.data_ptr(),
        memory.data_ptr(), loss.data_ptr(), native.address(terms), native.address(similarity),
        dT, dA, dR, scalars,
    )  # fmt: skip


SMALL = Small()
