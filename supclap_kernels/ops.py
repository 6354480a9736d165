"""The boundary to PyTorch: a forward and a backward operator, and the Function over them.

    svr_loss           -> loss () or (N,), stats (11,) or (0,), state (22, N), saved (any,)
    svr_loss_backward  -> dA, dT, dR, dk, db; (0,) where `needs` says no

Which backend runs is decided inside, on real tensors; all obey the shapes that the fake kernels
state. `state` holds the softmax statistics and the geometry of each row, `saved` what the backend
wants to reuse (kept panels, or SigLIP's gradients). Where nothing looks at operators the Function
calls the backend itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import collectives, dispatch, distributed
from .backends import contract
from .backends.contract import Inputs
from .backends.state import STATE_ROWS
from .options import Options
from .reference import accumulator_dtype
from .stats import SVRStats

_TENSORS = (
    "Tensor audio, Tensor text, Tensor? radius, Tensor scale, Tensor? bias, "
    "Tensor? ids, Tensor? weight"
)
_OPTIONS = (
    "str objective, str bilateral, float alpha, float beta, bool normalize, bool renormalize, "
    "str reduction, int workspace, str backend, bool stats"
)
_library = torch.library.Library("supclap_kernels", "DEF")
_library.define(
    f"svr_loss({_TENSORS}, bool[5] needs, {_OPTIONS}) "
    "-> (Tensor loss, Tensor stats, Tensor state, Tensor saved)"
)
_library.define(
    f"svr_loss_backward(Tensor upstream, {_TENSORS}, Tensor state, Tensor saved, bool[5] needs, "
    f"{_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _without_autograd(x: Tensor, function: Callable[..., tuple[Any, ...]], *given: Any) -> Any:
    """Call a backend without autograd and autocast around its own products, on the device of x."""
    device = x.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _without_autograd(x, function, *given)
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(*given)
    return function(*given)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, needs, options = Inputs(*arguments[:7]), arguments[7], Options(*arguments[8:])
    backend = dispatch.backend_for(inputs.audio, options)
    given = (inputs, options, tuple(needs))
    loss, stats, state, saved = _without_autograd(inputs.audio, backend.forward, *given)
    return loss, loss.new_empty(0) if stats is None else stats, state, saved


def _backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, options = Inputs(*arguments[:7]), Options(*arguments[10:])
    backend = dispatch.backend_for(inputs.audio, options)
    state, saved, needs = arguments[7:10]
    given = (inputs, options, tuple(needs), upstream, state, saved)
    found = _without_autograd(inputs.audio, backend.backward, *given)
    return tuple(state.new_empty(0, dtype=torch.float32) if g is None else g for g in found)


for _device in ("CPU", "CUDA"):
    _library.impl("svr_loss", _forward, _device)
    _library.impl("svr_loss_backward", _backward, _device)
# Differentiation is SVRFunction's; the bare operators return plain values.
for _name in ("svr_loss", "svr_loss_backward"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("supclap_kernels::svr_loss", lib=_library)
def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, needs, options = Inputs(*arguments[:7]), arguments[7], Options(*arguments[8:])
    audio, dtype = inputs.audio, accumulator_dtype(inputs.audio.dtype)
    N, D = audio.shape
    radius = inputs.radius is not None
    backend = dispatch.backend_for(audio, options)
    size = backend.saved_elements(N, D, audio.dtype, radius, options, any(needs))
    return (
        audio.new_empty((N,) if options.reduction == "none" else (), dtype=dtype),
        audio.new_empty(len(SVRStats._fields) if options.stats else 0, dtype=dtype),
        audio.new_empty((STATE_ROWS, N), dtype=dtype),
        audio.new_empty(size, dtype=dtype),
    )


@torch.library.register_fake("supclap_kernels::svr_loss_backward", lib=_library)
def _fake_backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, needs, dtype = Inputs(*arguments[:7]), arguments[9], torch.float32
    return tuple(
        x.new_empty(x.shape) if need and x is not None else inputs.audio.new_empty(0, dtype=dtype)
        for x, need in zip(inputs[:5], needs, strict=True)
    )


def watched(inputs: Inputs) -> bool:
    """Whether something looks at operators (a compiler, a tracer, a mode, a tensor of another
    kind): then the call must be one."""
    if torch.compiler.is_compiling():
        return True
    for x in inputs:
        if x is not None and type(x) is not Tensor and type(x) is not nn.Parameter:
            return True
    modes = torch._C._len_torch_dispatch_stack() > 0
    return modes or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()


class SVRFunction(torch.autograd.Function):
    """loss, stats = apply(audio, text, radius, scale, bias, ids, weight, needs, options, backend):
    of the operators where the backend is None."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, needs, options, backend = arguments
        if backend is None:
            found = torch.ops.supclap_kernels.svr_loss(*tensors, needs, *options)
        else:
            found = _without_autograd(tensors[0], backend.forward, Inputs(*tensors), options, needs)
        loss, stats, state, saved = found
        ctx.save_for_backward(*tensors, state, saved)
        ctx.needs, ctx.options, ctx.backend = needs, options, backend
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: activation checkpointing unpacks them a single time
        inputs, needs, options = Inputs(*tensors[:7]), ctx.needs, ctx.options
        if ctx.backend is None or watched(inputs):
            arguments = (upstream, *tensors, needs, *options)
            gradients = torch.ops.supclap_kernels.svr_loss_backward(*arguments)
        else:
            given = (inputs, options, needs, upstream, *tensors[7:])
            gradients = _without_autograd(upstream, ctx.backend.backward, *given)
        return (*_returned(gradients, needs, upstream, inputs), *[None] * 5)


class GroupFunction(torch.autograd.Function):
    """loss, stats = apply(audio, text, radius, scale, bias, ids, weight, plan): over a process
    group (distributed.Plan), in eager mode."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.plan = arguments
        loss, stats, memory = _without_autograd(
            tensors[0], _group_forward, ctx.plan, Inputs(*tensors)
        )
        ctx.names = list(memory)
        ctx.save_for_backward(*tensors, *memory.values())
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:5]
        inputs, memory = Inputs(*tensors[:7]), dict(zip(ctx.names, tensors[7:], strict=True))
        gradients = _without_autograd(upstream, _group_backward, ctx.plan, inputs, memory, upstream)
        return (*_returned(gradients, needs, upstream, inputs), None, None, None)


def _group_forward(plan: Any, inputs: Inputs) -> tuple[Any, ...]:
    work = distributed.Pass(plan, inputs)
    return *work.forward(), work.memory


def _group_backward(plan: Any, inputs: Inputs, memory: Any, upstream: Tensor) -> tuple[Any, ...]:
    found = distributed.Pass(plan, inputs, memory).backward(upstream)
    return contract.returned(inputs, plan.needs, *found)


def _returned(
    gradients: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    upstream: Tensor,
    inputs: Inputs,
) -> tuple[Tensor | None, ...]:
    """For autograd: None where none is needed; with create_graph an error that waits."""
    wanted = tuple(g if need else None for g, need in zip(gradients, needs, strict=True))
    if not torch.is_grad_enabled():
        return wanted
    sources = [x for x in (upstream, *inputs[:5]) if x is not None]
    return tuple(None if g is None else OnceDifferentiable.apply(g, *sources) for g in wanted)


class OnceDifferentiable(torch.autograd.Function):
    """gradient = apply(gradient, *sources): an error where a second derivative would be wrong."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the kernels of fused_svr_loss have no second derivative; use backend='reference'"
        )


def refuse_tangents(inputs: Inputs) -> None:
    """Forward-mode differentiation would lose the tangents without a word."""
    for x in inputs[:5]:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "the kernels of fused_svr_loss have no forward-mode derivative; "
                "use backend='reference'"
            )


def svr_loss(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor | None]:
    """The loss and the values of SVRStats (empty or None unless `options.stats`), with autograd."""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        refuse_tangents(inputs)
    recording = torch.is_grad_enabled()
    needs = tuple(recording and x is not None and x.requires_grad for x in inputs[:5])
    backend = None if watched(inputs) else dispatch.backend_for(inputs.audio, options)
    if any(needs):
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "the kernels of fused_svr_loss have no rule for torch.func transforms with "
                "gradients; use torch.autograd.grad, or backend='reference'"
            )
        given = tuple(options) if backend is None else options
        return SVRFunction.apply(*inputs, needs, given, backend)
    if backend is None:
        return torch.ops.supclap_kernels.svr_loss(*inputs, needs, *options)[:2]
    return _without_autograd(inputs.audio, backend.forward, inputs, options, needs)[:2]


def group_loss(
    inputs: Inputs, options: Options, group: Any, exchange: str
) -> tuple[Tensor, Tensor]:
    """The loss over a process group of several ranks, after all of them agreed on the call."""
    recording = torch.is_grad_enabled()
    needs = [recording and x is not None and x.requires_grad for x in inputs[:5]]
    backend = dispatch.choose(options.backend, inputs.audio.device, inputs.audio.dtype)[0]
    call = collectives.describe(*inputs[:3], *inputs[5:], **options._asdict())
    call |= {"backend": backend, "exchange": exchange, "bias": inputs.bias is not None}
    towers = {"audio": needs[0], "text": needs[1]}
    free = ("pairs", "workspace", *towers)
    said = collectives.agree(group, {**call, **towers}, free)
    for n, name in enumerate(towers):  # what one rank wants, all help with
        needs[n] = any(one[name] for one in said)
    sizes = tuple(one["pairs"] for one in said)
    plan = distributed.Plan(options, group, exchange == "ring", sizes, tuple(needs))
    return GroupFunction.apply(*inputs, plan)
