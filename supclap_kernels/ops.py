"""The boundary to PyTorch: a forward and a backward operator, and the Function over them.

    svr_loss           -> loss () or (N,), stats (11,) or (0,), state (22, N), saved (any,)
    svr_loss_backward  -> dA, dT, dR, dk, db; (0,) where `needs` says no

Which backend runs is decided inside, on real tensors; all obey the shapes that the fake kernels
state. `state` holds the softmax statistics and the geometry of each row, `saved` what the backend
wants to reuse (kept panels, or SigLIP's gradients). Where nothing looks at operators the Function
calls the backend itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import dispatch
from .backends.call import Tensors
from .backends.state import STATE_ROWS
from .checks import is_lazy, written_out
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


def without_autograd(x: Tensor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a backend without autograd and autocast around its own products, on the device of x."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return without_autograd(x, function, *arguments)
    kind = "cuda" if x.is_cuda else "cpu"
    if torch.is_grad_enabled() or torch.is_autocast_enabled(kind):
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return function(*arguments)
    return function(*arguments)


def _split(arguments: tuple[Any, ...]) -> tuple[Tensors, tuple[Any, ...]]:
    """An operator's arguments: the tensors of the call, and what comes after them."""
    count = len(Tensors._fields)
    return Tensors(*arguments[:count]), arguments[count:]


def refuse_misfits(inputs: Tensors) -> None:
    """Raises where tensors do not fit together: the kernels read memory without asking. checks.py
    has seen to that, unless operators are called by themselves, or an assignment to `data` or to a
    storage changed a tensor after forward."""
    rows = tuple(inputs.audio.shape)
    vector, number = rows[:1], ()
    allowed = ((rows,), (rows,), (vector, number), (number,), (number,), (vector,), (vector,))
    for name, x, shapes in zip(Tensors._fields, inputs, allowed, strict=True):
        if x is None:
            continue
        if tuple(x.shape) not in shapes:
            raise RuntimeError(f"{name} has shape {tuple(x.shape)} beside audio {rows}")
        if x.numel() and not x.untyped_storage().nbytes():
            raise RuntimeError(f"{name} has no memory any more: its storage was resized")


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (needs, *values) = _split(arguments)
    options = Options(*values)
    refuse_misfits(inputs)
    dispatch.refuse_unproven(inputs, options)
    backend = dispatch.implementation(dispatch.operator_way(inputs, options))
    outputs = without_autograd(inputs.audio, backend.forward, inputs, options, tuple(needs))
    loss, stats, state, saved = outputs
    return loss, loss.new_empty(0) if stats is None else stats, state, saved


def _backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, (state, saved, needs, *values) = _split(arguments)
    options = Options(*values)
    refuse_misfits(inputs)
    backend = dispatch.implementation(dispatch.operator_way(inputs, options))
    call = (inputs, options, tuple(needs), upstream, state, saved)
    gradients = without_autograd(inputs.audio, backend.backward, *call)
    return tuple(state.new_empty(0, dtype=torch.float32) if g is None else g for g in gradients)


for _device in ("CPU", "CUDA"):
    _library.impl("svr_loss", _forward, _device)
    _library.impl("svr_loss_backward", _backward, _device)
# Differentiation is SVRFunction's; the bare operators return plain values.
for _name in ("svr_loss", "svr_loss_backward"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("supclap_kernels::svr_loss", lib=_library)
def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (needs, *values) = _split(arguments)
    audio, options = inputs.audio, Options(*values)
    dtype, N = accumulator_dtype(audio.dtype), audio.shape[0]
    return (
        audio.new_empty((N,) if options.reduction == "none" else (), dtype=dtype),
        audio.new_empty(len(SVRStats._fields) if options.stats else 0, dtype=dtype),
        audio.new_empty((STATE_ROWS, N), dtype=dtype),
        audio.new_empty(dispatch.saved_elements(inputs, options, any(needs)), dtype=dtype),
    )


@torch.library.register_fake("supclap_kernels::svr_loss_backward", lib=_library)
def _fake_backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, (_, _, needs, *_) = _split(arguments)
    absent = inputs.audio.new_empty(0, dtype=torch.float32)
    return tuple(
        x.new_empty(x.shape) if need and x is not None else torch.empty_like(absent)
        for x, need in zip(inputs[:5], needs, strict=True)
    )


def watched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether something looks at operators (a compiler, a tracer, a mode, a tensor of another kind,
    one of many that are batched): then the call must be one."""
    if torch.compiler.is_compiling():
        return True
    for x in tensors:
        if x is not None and type(x) is not Tensor and type(x) is not nn.Parameter:
            return True
        if x is not None and torch._C._functorch.is_legacy_batchedtensor(x):
            return True
    modes = torch._C._len_torch_dispatch_stack() > 0
    return modes or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()


class SVRFunction(torch.autograd.Function):
    """loss, stats = apply(audio, text, radius, scale, bias, ids, weight, needs, options, way).

    Where the way is None the operators are called; their options are plain values.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, needs, options, way = arguments
        if way is None:
            outputs = torch.ops.supclap_kernels.svr_loss(*tensors, needs, *options)
        else:
            backend = dispatch.implementation(way)
            outputs = without_autograd(
                tensors[0], backend.forward, Tensors(*tensors), options, needs
            )
        loss, stats, state, saved = outputs
        ctx.save_for_backward(*tensors, state, saved)
        ctx.needs, ctx.options, ctx.way = needs, options, way
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if is_lazy(upstream):
            upstream = written_out(upstream)
        # Read once: activation checkpointing unpacks the saved tensors a single time.
        *tensors, state, saved = ctx.saved_tensors
        inputs, needs, options = Tensors(*tensors), ctx.needs, ctx.options
        if ctx.way is None or watched((*inputs, upstream)):
            if ctx.way is not None:  # forward's own, whatever an operator would choose
                options = options._replace(backend=ctx.way)
            arguments = (upstream, *tensors, state, saved, needs, *options)
            gradients = torch.ops.supclap_kernels.svr_loss_backward(*arguments)
        else:
            refuse_misfits(inputs)
            call = (inputs, options, needs, upstream, state, saved)
            backend = dispatch.implementation(ctx.way)
            gradients = without_autograd(upstream, backend.backward, *call)
        no_gradient = (None,) * 5  # of ids, weight, needs, options, way
        return *for_autograd(gradients, needs, upstream, inputs[:5]), *no_gradient


def for_autograd(
    gradients: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    upstream: Tensor,
    inputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of inputs that are needed, else None; with create_graph an error that waits."""
    needed = tuple(g if need else None for g, need in zip(gradients, needs, strict=True))
    if not torch.is_grad_enabled():
        return needed
    sources = [x for x in (upstream, *inputs) if x is not None]
    return tuple(None if g is None else OnceDifferentiable.apply(g, *sources) for g in needed)


class OnceDifferentiable(torch.autograd.Function):
    """gradient = apply(gradient, *sources): an error where a second derivative would be wrong.

    PyTorch's `once_differentiable` does the same, but its error names no remedy.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the kernels of fused_svr_loss have no second derivative; use backend='reference'"
        )


def refuse_tangents(inputs: Tensors) -> None:
    """Forward-mode differentiation would lose the tangents without a word."""
    for x in inputs[:5]:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "the kernels of fused_svr_loss have no forward-mode derivative; "
                "use backend='reference'"
            )


def svr_loss(inputs: Tensors, options: Options) -> tuple[Tensor, Tensor | None]:
    """The loss and the values of SVRStats (empty or None unless `options.stats`), with autograd."""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        refuse_tangents(inputs)
    recording = torch.is_grad_enabled()
    needs = tuple(recording and x is not None and x.requires_grad for x in inputs[:5])
    way = None if watched(inputs) else dispatch.way_for(inputs, options)
    if any(needs):
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "the kernels of fused_svr_loss have no rule for torch.func transforms with "
                "gradients; use torch.autograd.grad, or backend='reference'"
            )
        call_options = tuple(options) if way is None else options
        return SVRFunction.apply(*inputs, needs, call_options, way)
    if way is None:
        return torch.ops.supclap_kernels.svr_loss(*inputs, needs, *options)[:2]
    forward = dispatch.implementation(way).forward
    return without_autograd(inputs.audio, forward, inputs, options, needs)[:2]
