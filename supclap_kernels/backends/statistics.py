"""The arithmetic of SVRStats: sums over rows and over negatives, from which its means are made."""

import math

import torch
from torch import Tensor

from .state import GAP, POSITIVE, STATE_GEOMETRY


def negatives_between(T: Tensor, A: Tensor, ids: Tensor | None, I: slice, J: slice) -> Tensor:
    """(2,) float64: sum and count of <t, a> over the negatives between rows I and J, each way if
    they differ. Costs O(N D): the sum over all pairs, minus the positives, minus the pairs with
    equal ids."""
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


def negatives_beyond(X: Tensor, Y: Tensor, ids: Tensor | None, theirs: Tensor | None) -> Tensor:
    """(2,) float64: sum and count of <x, y> over rows X (N, .) and columns Y (M, .) that are none
    of one id. Costs O((N + M) D)."""
    x, y = X.double(), Y.double()
    total = torch.stack((x.sum(dim=0) @ y.sum(dim=0), x.new_tensor(float(len(x) * len(y)))))
    if ids is None or theirs is None:
        return total
    codes = torch.unique(torch.cat((ids, theirs)), return_inverse=True)[1].split([len(x), len(y)])
    groups = x.new_zeros(2, len(x) + len(y), x.shape[1])
    counts = []
    for group, code, rows in zip(groups, codes, (x, y), strict=True):
        group.index_add_(0, code, rows)
        counts.append(code.bincount(minlength=len(group)).double())
    return total - torch.stack(((groups[0] * groups[1]).sum(), counts[0] @ counts[1]))


def row_values(
    radius: Tensor | None, weight: Tensor | None, terms: Tensor, state: Tensor
) -> Tensor:
    """(10,) float64: sums over rows of what SVRStats averages over them, in its order."""
    losses = terms[:4] if weight is None else terms[:4] * weight
    geometry = state[STATE_GEOMETRY:]
    radius_values = [torch.full_like(geometry[GAP], math.nan)] * 3
    if radius is not None:
        R = radius.to(state.dtype).expand_as(geometry[GAP])
        radius_values = [R, geometry[GAP], 1.0 - R / geometry[GAP]]
    values = [*losses, *(1.0 - terms[4:]), geometry[POSITIVE], *radius_values]
    return torch.stack(values).double().sum(dim=1)


def means(values: Tensor, N: int, similarity: Tensor) -> Tensor:
    """(11,): the values of SVRStats, from `row_values` and the negatives' (sum, count)."""
    means, (total, count) = values / N, similarity
    mean = torch.where(count > 0, total / count, math.nan)  # without negatives `total` is rounding
    return torch.cat((means[:7], mean[None], means[7:]))
