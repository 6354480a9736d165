"""The short way of ordinary calls: one native call for forward, one for backward.

csrc/direct.h says what is ordinary, looks at the arguments itself, and declines everything else:
that goes through checks.py and ops.py, where errors and conversions are. Both compute the same.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, native
from .backends import available
from .backends.call import Tensors
from .checks import as_scalar, checked_options
from .ops import for_autograd
from .options import Options


class Calls(NamedTuple):
    """What takes the ordinary calls with some options, by the device; None: nothing does."""

    options: Options
    cpu: Any
    cuda: Any


@functools.lru_cache(maxsize=256, typed=True)
def calls_for(*values: Any) -> Calls | None:
    """Of options in the order of Options; None: no call with them is ordinary."""
    options = checked_options(*values)
    module, _ = native.load()
    if options.reduction == "none" or options.stats or module is None or not module.has_exchange():
        return None
    return Calls(options, small_calls(options), single_calls(options))


def small_calls(options: Options) -> Any:
    """One native call on a CPU (backends/cpu/small.py)."""
    if options.backend not in ("auto", "cpu", "cpu:small"):
        return None
    return native.module().SmallCalls(
        options.infonce, options.support(True), options.mirror(True), options.shared(True),
        options.renormalize, options.normalize, options.reduction == "mean", options.alpha,
        options.beta, functools.partial(is_ours, options, "cpu:small"), torch.get_num_threads,
    )  # fmt: skip


def single_calls(options: Options) -> Any:
    """One launch on a GPU (backends/cuda/single.py), or where the host stands in for it."""
    if options.backend not in ("auto", "cuda", "cuda:single") or available.cuda() != "ok":
        return None
    return native.cuda().SingleCalls(
        options.infonce, options.mode(True), options.renormalize, options.normalize,
        options.reduction == "mean", options.alpha, options.beta, native.on_host(),
        functools.partial(is_ours, options, "cuda:single"),
    )  # fmt: skip


def forget() -> None:
    """What is remembered of the machine: it was tuned, or a test changed it."""
    dispatch.forget()
    calls_for.cache_clear()


def is_ours(options: Options, way: str, audio: Tensor, radius: bool) -> bool | None:
    """Whether this way takes such embeddings; None: ask again."""
    call = dispatch.remembered_as(audio, radius, options)
    if dispatch.route(len(audio), dispatch.remembered_routes(call)).way != way:
        return False
    return True if dispatch.is_trusted(way, audio, radius, options) else None


def loss_of(tensors: tuple[Any, ...], values: tuple[Any, ...]) -> Tensor | None:
    """The loss of an ordinary call with these arguments and options; None: it is not one."""
    try:
        found = calls_for(*values)
    except TypeError:  # not hashable, or of a wrong type, which is told elsewhere
        return None
    if found is None:
        return None
    on_gpu = getattr(tensors[0], "is_cuda", False) or found.cpu is None
    calls = found.cuda if on_gpu else found.cpu
    call = None if calls is None else calls(tensors)
    if call is None:
        return None
    if call.gradient:
        loss: Tensor = apply(*call.tensors, call, found.options)
        return loss
    return call.forward()


class DirectFunction(torch.autograd.Function):
    """loss = apply(*tensors, call, options), the tensors as in Tensors; None for a number."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.call, ctx.options = arguments
        loss: Tensor = ctx.call.forward()
        ctx.save_for_backward(*tensors, ctx.call.kept)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # once: checkpointing unpacks them a single time
        gradients = None
        if not torch.compiler.is_compiling():
            gradients = ctx.call.backward(upstream, inputs)
        if gradients is None:
            gradients = by_operator(ctx.call, ctx.options, Tensors(*inputs[:-1]), upstream)
        if torch.is_grad_enabled():
            gradients = for_autograd(gradients, ctx.call.needs, upstream, inputs[:5])
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
