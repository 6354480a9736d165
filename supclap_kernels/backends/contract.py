"""What every backend takes and returns: the tensors of a call, and those that pass from forward to
backward."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import Options
from .panel import PLACEHOLDER, Tiling, kept_elements
from .state import GAP, MIRROR, ONE_SIDED, PLAIN, POSITIVE, SHARED, STATE_GEOMETRY


class Inputs(NamedTuple):
    """The tensors of one call, detached, on one device."""

    audio: Tensor
    text: Tensor
    radius: Tensor | None
    scale: Tensor
    bias: Tensor | None
    ids: Tensor | None
    weight: Tensor | None


def grams(has_radius: bool, options: Options) -> int:
    """How many of Q and K the mode needs."""
    return options.support(has_radius) + options.mirror(has_radius)


def mode(has_radius: bool, options: Options) -> int:
    if not options.support(has_radius):
        return PLAIN
    if options.mirror(has_radius):
        return MIRROR
    return SHARED if options.shared(has_radius) else ONE_SIDED


def saved_elements(
    N: Any, D: int, has_radius: bool, options: Options, itemsize: int, keep: bool, tiling: Tiling
) -> Any:
    """Length of the buffer that forward leaves for backward; N may be symbolic.

    Kept panels, or (SigLIP) the gradients themselves, or PLACEHOLDER elements.
    """
    if not keep:
        return PLACEHOLDER
    if options.gradient_in_forward:
        return 2 * N * D + N + 2
    return kept_elements(N, grams(has_radius, options), itemsize, tiling, options.workspace)


def split_gradients(saved: Tensor, N: int, D: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dA, dT (N, D), dR (N,) and (dk, db) as views of SigLIP's `saved`."""
    dA, dT, dR, scalars = saved.split([N * D, N * D, N, 2])
    return dA.view(N, D), dT.view(N, D), dR, scalars


def reduced_gradients(
    inputs: Inputs, saved: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SigLIP's gradients, kept for an upstream gradient of 1, times `upstream`."""
    dA, dT, dR, scalars = (part * upstream for part in split_gradients(saved, *inputs.audio.shape))
    if inputs.radius is not None:
        dR = dR[: inputs.radius.numel()].view(inputs.radius.shape).clone()
    return dA, dT, dR, scalars


def returned(
    inputs: Inputs,
    needs: tuple[bool, ...],
    dA: Tensor | None,
    dT: Tensor | None,
    dR: Tensor | None,
    scalars: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of audio, text, radius, scale, bias, each in its own dtype and shape; or None."""
    dk, db = (scalars[n].clone() if needs[3 + n] else None for n in range(2))  # share no memory
    return tuple(
        value.to(x.dtype) if need and value is not None and x is not None else None
        for value, x, need in zip((dA, dT, dR, dk, db), inputs[:5], needs, strict=True)
    )


def negatives_between(T: Tensor, A: Tensor, ids: Tensor | None, I: slice, J: slice) -> Tensor:
    """(2,) float64: sum and count of <t, a> over the negatives between rows I and J, each way if
    they differ. In O(N D): all pairs less the positives and those of equal ids."""
    total = torch.zeros(2, dtype=torch.float64, device=T.device)
    code = None if ids is None else torch.unique(ids, return_inverse=True)[1]
    for texts, audios in ((I, J),) if I == J else ((I, J), (J, I)):
        t, a = T[texts].double(), A[audios].double()
        total[0] += t.sum(dim=0) @ a.sum(dim=0)
        total[1] += len(t) * len(a)
        if code is not None:
            groups = t.new_zeros(2, len(T), T.shape[1])
            groups[0].index_add_(0, code[texts], t)
            groups[1].index_add_(0, code[audios], a)
            counts = [code[part].bincount(minlength=len(T)).double() for part in (texts, audios)]
            total[0] -= (groups[0] * groups[1]).sum()
            total[1] -= counts[0] @ counts[1]
        elif I == J:
            total[0] -= (t * a).sum()
            total[1] -= len(t)
    return total


def row_values(inputs: Inputs, terms: Tensor, state: Tensor) -> Tensor:
    """(10,) float64: sums over rows of what SVRStats averages over them, in its order."""
    losses = terms[:4] if inputs.weight is None else terms[:4] * inputs.weight
    geometry = state[STATE_GEOMETRY:]
    radius_values = [torch.full_like(geometry[GAP], math.nan)] * 3
    if inputs.radius is not None:
        R = inputs.radius.to(state.dtype).expand_as(geometry[GAP])
        radius_values = [R, geometry[GAP], 1.0 - R / geometry[GAP]]
    values = [*losses, *(1.0 - terms[4:]), geometry[POSITIVE], *radius_values]
    return torch.stack(values).double().sum(dim=1)


def statistics(values: Tensor, N: int, similarity: Tensor) -> Tensor:
    """(11,): the values of SVRStats, from `row_values` and the negatives' (sum, count)."""
    means, (total, count) = values / N, similarity
    mean = torch.where(count > 0, total / count, math.nan)  # without negatives `total` is rounding
    return torch.cat((means[:7], mean[None], means[7:]))
