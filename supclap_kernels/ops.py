"""The boundary to PyTorch: one forward operator, one backward operator, and the autograd.Function over them.

    svr_loss           -> loss () or (N,), stats (11,) or (0,), state (12, N), saved (any,)
    svr_loss_backward  -> dA, dT, dR, dk, db; (0,) where `needs` says no

Which backend runs is decided inside, on real tensors; all obey the shapes that the fake kernels state. `state` holds
the softmax statistics of each row, `saved` what the backend wants to reuse (kept panels, or SigLIP's gradients).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .backends.cpu import Inputs, saved_elements
from .options import Options
from .reference import accumulator_dtype

STATE_ROWS = 12
STATS = 11

_TENSORS = "Tensor audio, Tensor text, Tensor? radius, Tensor scale, Tensor? bias, Tensor? ids, Tensor? weight"
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
    f"svr_loss_backward(Tensor upstream, {_TENSORS}, Tensor state, Tensor saved, bool[5] needs, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(audio, text, radius, scale, bias, ids, weight, needs, *options):
    inputs, chosen = Inputs(audio, text, radius, scale, bias, ids, weight), Options(*options)
    backend = dispatch.backend_for(audio, chosen)
    with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
        return backend.forward(inputs, chosen, tuple(needs))


def _backward(upstream, audio, text, radius, scale, bias, ids, weight, state, saved, needs, *options):
    inputs, chosen = Inputs(audio, text, radius, scale, bias, ids, weight), Options(*options)
    backend = dispatch.backend_for(audio, chosen)
    with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
        return backend.backward(upstream, inputs, state, saved, chosen, tuple(needs))


for _device in ("CPU", "CUDA"):
    _library.impl("svr_loss", _forward, _device)
    _library.impl("svr_loss_backward", _backward, _device)
# Differentiation is SVRFunction's; the bare operators return plain values.
for _name in ("svr_loss", "svr_loss_backward"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("supclap_kernels::svr_loss", lib=_library)
def _fake_forward(audio, text, radius, scale, bias, ids, weight, needs, *options):
    chosen = Options(*options)
    N, D = audio.shape
    dtype = accumulator_dtype(audio.dtype)
    size = saved_elements(N, D, radius is not None, chosen, dtype.itemsize, any(needs))
    return (
        audio.new_empty((N,) if chosen.reduction == "none" else (), dtype=dtype),
        audio.new_empty(STATS if chosen.stats else 0, dtype=dtype),
        audio.new_empty((STATE_ROWS, N), dtype=dtype),
        audio.new_empty(size, dtype=dtype),
    )


@torch.library.register_fake("supclap_kernels::svr_loss_backward", lib=_library)
def _fake_backward(upstream, audio, text, radius, scale, bias, ids, weight, state, saved, needs, *options):
    inputs = (audio, text, radius, scale, bias)
    return tuple(
        x.new_empty(x.shape) if need else audio.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


class SVRFunction(torch.autograd.Function):
    """loss, stats = apply(audio, text, radius, scale, bias, ids, weight, needs, options)"""

    @staticmethod
    def forward(ctx, audio, text, radius, scale, bias, ids, weight, needs, options):
        tensors = (audio, text, radius, scale, bias, ids, weight)
        loss, stats, state, saved = torch.ops.supclap_kernels.svr_loss(*tensors, needs, *options)
        ctx.save_for_backward(*tensors, state, saved)
        ctx.needs, ctx.options = needs, options
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        arguments = (upstream, *ctx.saved_tensors, ctx.needs, *ctx.options)
        gradients = torch.ops.supclap_kernels.svr_loss_backward(*arguments)
        used = (g if need else None for g, need in zip(gradients, ctx.needs, strict=True))
        return (*used, None, None, None, None)


def svr_loss(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """The loss and the values of SVRStats (empty unless `options.stats`), with autograd."""
    recording = torch.is_grad_enabled()
    needs = tuple(recording and x is not None and x.requires_grad for x in inputs[:5])
    if any(needs):
        return SVRFunction.apply(*inputs, needs, tuple(options))
    return torch.ops.supclap_kernels.svr_loss(*inputs, needs, *options)[:2]
