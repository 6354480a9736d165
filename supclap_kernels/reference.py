"""The specification: the SVR loss of SupCLAP (arXiv 2509.21033) in eager PyTorch.

Everything else in this package must return these values and their autograd gradients. Symbols (see
MATH.md):

    T, A   (N, D)  text and audio embeddings; row i of T belongs to row i of A
    k, b           logit scale and (SigLIP) logit bias
    r_i            gap |a_i - t_i|, smoothed: sqrt(|a_i - t_i|^2 + EPS^2)
    u_i            pulling direction (a_i - t_i) / r_i
    R_i            semantic radius
    T_sup, A_sup   support vectors t_i + R_i u_i and a_i - R_i u_i
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .groups import looked_up
from .negatives import Negatives, check_negatives, columns_of
from .options import as_python_number, check_choices
from .stats import SVRStats

EPS = 1e-4
"""Smoothing of the gap: loss and gradient stay finite at a_i = t_i."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gap_and_direction(T: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """r (N,) and u (N, D)."""
    step = A - T
    r = (step.square().sum(dim=1) + EPS**2).sqrt()
    return r, step / r[:, None]


def kept_pairs(N: int, ids: Tensor | None, device: torch.device) -> Tensor:
    """(N, N) bool: positives and negatives; a pair of different rows with equal ids is neither."""
    positive = torch.eye(N, dtype=torch.bool, device=device)
    if ids is None:
        return torch.ones_like(positive)
    return positive | (ids[:, None] != ids[None, :])


def infonce_rows(logits: Tensor, keep: Tensor) -> Tensor:
    """(N,): cross entropy of each row of the (N, N) logits, or (N, N + M) with further columns,
    against the diagonal."""
    return logits.masked_fill(~keep, float("-inf")).logsumexp(dim=1) - logits.diagonal()


def siglip_rows(logits: Tensor, keep: Tensor) -> Tensor:
    """(N,): sum over each row of softplus(-z logits), z = +1 on the diagonal and -1 off it."""
    z = 2.0 * torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device) - 1.0
    return (-F.logsigmoid(z * logits) * keep).sum(dim=1)


def support_vector(X: Tensor, Y: Tensor, R: Tensor, renormalize: bool) -> Tensor:
    """(N, D): each row of X moved by R_i towards its partner in Y: T_sup of T, A, A_sup of A, T."""
    _, u = gap_and_direction(X, Y)
    moved = X + R[:, None] * u
    return F.normalize(moved, dim=1) if renormalize else moved


def support_vectors(T: Tensor, A: Tensor, R: Tensor, renormalize: bool) -> tuple[Tensor, Tensor]:
    """T_sup and A_sup (N, D): each row moved by R_i along u_i, towards its partner."""
    _, u = gap_and_direction(T, A)
    T_sup, A_sup = T + R[:, None] * u, A - R[:, None] * u
    return (F.normalize(T_sup, dim=1), F.normalize(A_sup, dim=1)) if renormalize else (T_sup, A_sup)


class Direction(NamedTuple):
    """Row i compares x_i with every y_j, and y_i is its positive."""

    X: Tensor
    Y: Tensor
    side: str
    """of Y: "audio" or "text", where further negatives are columns, too"""


def directions_of(
    T: Tensor, A: Tensor, R: Tensor | None, infonce: bool, bilateral: str, renormalize: bool
) -> dict[str, list[Direction]]:
    """The directions of each term."""
    a2t = [Direction(A, T, "text")] if infonce else []
    directions = {"t2a": [Direction(T, A, "audio")], "a2t": a2t, "svr": []}
    if R is not None:
        T_sup, A_sup = support_vectors(T, A, R, renormalize)
        directions["svr"].append(Direction(T_sup, A, "audio"))
        if bilateral == "mirror":
            directions["svr"].append(Direction(A_sup, T, "text"))
        if bilateral == "shared" and infonce:
            directions["svr"].append(Direction(A, T_sup, "text"))
    return directions


@without_autocast
def svr_loss_reference(
    audio: Tensor,
    text: Tensor,
    radius: float | Tensor | None = None,
    logit_scale: float | Tensor = 1 / 0.07,
    logit_bias: float | Tensor | None = None,
    *,
    objective: str = "infonce",
    bilateral: str = "mirror",
    alpha: float = 1.0,
    beta: float = 0.0,
    normalize: bool = False,
    renormalize: bool = True,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
    exchange: str = "gather",
    workspace: int = 0,
    backend: str = "reference",
    return_stats: bool = False,
    negatives: Negatives | None = None,
) -> Any:
    """The loss, with the arguments of `fused_svr_loss`; any float dtype, twice differentiable,
    O(N^2) memory.

    float16 and bfloat16 inputs are raised to float32 first, so the result is exact for the given
    values. `exchange`, `workspace` and `backend` steer the kernels only and change nothing here.
    With a `group`, every rank computes the loss of all rows.
    """
    check_choices(objective=objective, bilateral=bilateral, reduction=reduction)
    group = looked_up(group)
    negatives = check_negatives(negatives, audio, ids, group is not None)
    if group is not None and group.size() > 1:
        from .collectives import over_group

        return over_group(
            svr_loss_reference, group, audio, text, radius, logit_scale, logit_bias, ids, weight,
            negatives,
            objective=objective, bilateral=bilateral, alpha=alpha, beta=beta, normalize=normalize,
            renormalize=renormalize, reduction=reduction, return_stats=return_stats,
        )  # fmt: skip
    alpha, beta, dtype = (
        as_python_number(alpha),
        as_python_number(beta),
        accumulator_dtype(audio.dtype),
    )
    number: dict[str, Any] = {"dtype": dtype, "device": audio.device}
    T, A = text.to(dtype), audio.to(dtype)
    N = len(T)
    k = torch.as_tensor(logit_scale, **number)
    b = torch.as_tensor(0.0 if logit_bias is None else logit_bias, **number)
    w = torch.ones(N, **number) if weight is None else weight.to(dtype)
    if normalize:
        T, A = F.normalize(T, dim=1), F.normalize(A, dim=1)
    keep = kept_pairs(N, ids, T.device)
    infonce = objective == "infonce"

    sides = ("audio", "text")
    further = {side: columns_of(negatives, side, ids, dtype, normalize) for side in sides}

    def logits(X: Tensor, Y: Tensor) -> Tensor:
        return k * X @ Y.t() if infonce else k * X @ Y.t() + b

    def rows(X: Tensor, Y: Tensor, side: str) -> Tensor:
        z, counted, columns = logits(X, Y), keep, further[side]
        if columns is not None:
            more = columns.keep
            more = keep.new_ones(N, len(columns.rows)) if more is None else more
            z, counted = torch.cat((z, logits(X, columns.rows)), 1), torch.cat((keep, more), 1)
        return infonce_rows(z, counted) if infonce else siglip_rows(z, counted)

    R = None if radius is None else torch.as_tensor(radius, **number).expand(N)
    directions = directions_of(T, A, R, infonce, bilateral, renormalize)
    zero = torch.zeros(N, **number)
    l_t2a, l_a2t, l_svr = (sum((rows(*d) for d in terms), zero) for terms in directions.values())
    if not infonce and further["text"] is not None:  # no direction has the texts for its columns
        beside = -F.logsigmoid(-logits(A, further["text"].rows))
        kept = further["text"].keep
        l_t2a = l_t2a + (beside if kept is None else beside * kept).sum(dim=1)
    l_cons, r = zero, None
    if R is not None:
        r, _ = gap_and_direction(T, A)
        l_cons = F.relu(R - r) + F.relu(-R)

    per_row = w * (l_t2a + l_a2t + alpha * l_svr + beta * l_cons)
    loss = per_row if reduction == "none" else per_row.sum()
    loss = loss / N if reduction == "mean" else loss
    if not return_stats:
        return loss
    terms = [(w * term).mean() for term in (l_t2a, l_a2t, l_svr, l_cons)]
    beyond = {
        side: (X @ columns.rows.t(), columns.keep)
        for side, X in (("audio", T), ("text", A))
        if (columns := further[side]) is not None
    }
    return loss, SVRStats.from_matrix(terms, T @ A.t(), k, b, keep, R, r, beyond)
