"""The short way of ordinary calls: one native call for forward, one for backward.

csrc/direct.h says what is ordinary, looks at the arguments itself, and declines everything else:
that goes through checks.py and ops.py, where errors and conversions are. Both compute the same.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import dispatch, native
from .backends.call import Tensors
from .checks import as_scalar, checked_options
from .ops import for_autograd
from .options import Options


@functools.lru_cache(maxsize=256, typed=True)
def calls_for(*values: Any) -> Any:
    """What takes the ordinary calls with these options (in the order of Options), or None."""
    options = checked_options(*values)
    small = options.backend in ("auto", "cpu", "cpu:small") and native.load()[0] is not None
    if options.reduction == "none" or options.stats or not small:
        return None
    module = native.module()
    if not module.has_exchange():
        return None
    calls = module.SmallCalls(
        options.infonce, options.support(True), options.mirror(True), options.shared(True),
        options.renormalize, options.normalize, options.reduction == "mean", options.alpha,
        options.beta, functools.partial(is_small, options), torch.get_num_threads,
    )  # fmt: skip
    return calls, options


def forget() -> None:
    """What is remembered of the machine: it was tuned, or a test changed it."""
    dispatch.forget()
    calls_for.cache_clear()


def is_small(options: Options, audio: Tensor, radius: bool) -> bool:
    """Whether such embeddings are a small batch on a CPU."""
    call = (options, audio.device, audio.dtype, audio.shape[1], radius, False)
    return dispatch.route(len(audio), dispatch.remembered_routes(*call)).way == "cpu:small"


def loss_of(tensors: tuple[Any, ...], values: tuple[Any, ...]) -> Tensor | None:
    """The loss of an ordinary call with these arguments and options; None: it is not one."""
    try:
        found = calls_for(*values)
    except TypeError:  # not hashable, or of a wrong type, which is told elsewhere
        return None
    if found is None:
        return None
    calls, options = found
    call = calls(*tensors)
    if call is None:
        return None
    if call.gradient:
        loss: Tensor = apply(*call.tensors, call, options)
        return loss
    return call.forward()


class DirectFunction(torch.autograd.Function):
    """loss = apply(*tensors, call, options), the tensors as in Tensors; None for a number."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.call, ctx.options = arguments
        ctx.save_for_backward(*tensors)
        loss: Tensor = ctx.call.forward()
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # once: checkpointing unpacks them a single time
        gradients = None
        if not torch.compiler.is_compiling():
            gradients = ctx.call.backward(upstream, inputs)
        if gradients is None:
            gradients = by_operator(ctx.call, ctx.options, Tensors(*inputs), upstream)
        if torch.is_grad_enabled():
            gradients = for_autograd(gradients, ctx.call.needs, upstream, Tensors(*inputs))
        return *gradients, None, None, None, None  # of ids, weight, call, options


# Without Function.apply's own search for transforms, of which an ordinary call has none.
apply = super(torch.autograd.Function, DirectFunction).apply


def by_operator(
    call: Any, options: Options, inputs: Tensors, upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by the operators, for what looks at operators."""
    numbers = dict(zip(Tensors._fields, call.numbers, strict=True))
    given = {name: x for name, x in numbers.items() if x is not None}
    tensors = inputs._replace(
        **{name: as_scalar(name, x, inputs.audio) for name, x in given.items()}
    )
    _, _, state, saved = torch.ops.supclap_kernels.svr_loss(*tensors, call.needs, *options)
    arguments = (upstream, *tensors, state, saved, call.needs, *options)
    gradients = torch.ops.supclap_kernels.svr_loss_backward(*arguments)
    return tuple(g if need else None for g, need in zip(gradients, call.needs, strict=True))
