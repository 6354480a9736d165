"""How much memory a call of the loss needs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.call import Backend, Tensors
from .backends.footprint import Step, peak_bytes, whole_pass
from .dispatch import call_of, check_described, implementation, route, routes
from .distributed import staged_backward, staged_forward
from .further import further_of
from .negatives import Negatives
from .options import Options, check_choices
from .plan import Plan
from .reference import svr_loss_reference


@torch.inference_mode(False)
def memory_estimate(
    N: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    radius: bool = True,
    device: str = "cpu",
    backend: str = "auto",
    negatives: tuple[int, int] = (0, 0),
    **options: Any,
) -> int:
    """Bytes of extra memory at the peak of forward and backward, beyond the inputs and the returned
    gradients.

    Args:
        N, D, dtype: of the embeddings.
        radius: whether support vectors are used.
        device, backend: as in `fused_svr_loss`.
        negatives: how many further audios and texts there are, without gradient.
        options: objective, bilateral, alpha, beta, normalize, renormalize, reduction, workspace.
    """
    check_described(N, D, dtype)
    settings = Options(**options)
    check_choices(
        objective=settings.objective, bilateral=settings.bilateral, reduction=settings.reduction
    )
    if len(negatives) != 2 or not all(type(M) is int and M >= 0 for M in negatives):
        raise ValueError(f"negatives must be two numbers of rows, got {negatives!r}")
    staged = any(negatives)
    ways = routes(backend, *call_of(device, dtype, D, settings, radius), staged=staged)
    way = (ways[-1] if staged else route(N, ways)).way
    rows = [torch.empty(M, D, dtype=dtype, device="meta") if M else None for M in negatives]
    further = Negatives(rows[0], rows[1])
    if way == "reference":
        step = eager_pass(settings, further)
    elif staged:
        step = staged_pass(implementation(way), settings, further)
    else:
        step = whole_pass(implementation(way), settings)
    return peak_bytes(step, N, D, dtype, radius, settings, [x for x in rows if x is not None])


def eager_pass(options: Options, negatives: Negatives) -> Step:
    """Forward and backward of the specification, in whatever mode of autograd the caller is."""
    named = options._asdict()
    return_stats = named.pop("stats")

    def step(inputs: Tensors, needs: tuple[bool, ...], upstream: Tensor) -> Sequence[Tensor | None]:
        given = (inputs.audio, inputs.text, inputs.radius, inputs.scale.to("meta"))
        leaves = [None if x is None else x.detach().requires_grad_() for x in given]
        found = svr_loss_reference(*leaves, negatives=negatives, return_stats=return_stats, **named)
        loss = found[0] if return_stats else found
        return torch.autograd.grad(loss, [x for x in leaves if x is not None], upstream)

    return step


def staged_pass(backend: Backend, options: Options, negatives: Negatives) -> Step:
    """Forward and backward with further negatives, which get no gradient."""

    def step(inputs: Tensors, needs: tuple[bool, ...], upstream: Tensor) -> Sequence[Tensor | None]:
        sizes = (len(inputs.audio),)
        plan = Plan(options, None, False, sizes, (*needs, False, False), backend)
        further = further_of(negatives, options.normalize)
        memory = staged_forward(plan, inputs, further)[2]
        return staged_backward(plan, inputs, further, memory, upstream)

    return step
