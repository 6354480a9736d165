"""Where the loss pushes the texts: the quantities the paper argues with, for each pair."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .options import as_python_number, check_choices
from .reference import (
    accumulator_dtype,
    directions_of,
    gap_and_direction,
    infonce_rows,
    kept_pairs,
    siglip_rows,
)


class ForceDecomposition(NamedTuple):
    """Forces on the text embeddings: minus the gradient of the summed loss, so a row does not
    shrink with N.

    `pull` comes through the logits of the positives, `push` through those of the negatives; force =
    pull + push (+ the radius constraint). Parallel and perpendicular are meant relative to u_i,
    from text to audio.
    """

    force: Tensor
    """(N, D)"""
    pull: Tensor
    """(N, D)"""
    push: Tensor
    """(N, D)"""
    parallel: Tensor
    """(N,): <push_i, u_i>"""
    perpendicular: Tensor
    """(N,): length of push_i without its part along u_i: what drives the drift"""
    drift_audio: Tensor
    """(N,): cos(force_i, a_i)"""
    drift_gap: Tensor
    """(N,): cos(force_i, u_i)"""
    contraction: Tensor
    """(N,): 1 - R_i / r_i, the factor on the perpendicular part of the SVR term; 1 without a radius
    """


def constant(x: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy without a graph, which autograd may keep even if x was made in inference mode."""
    return torch.as_tensor(x, dtype=dtype, device=like.device).detach().clone()


@torch.inference_mode(False)
@without_autocast
def force_decomposition(
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
) -> ForceDecomposition:
    """Decompose the loss' force on each text embedding. A diagnostic: eager, O(N^2) memory, no
    gradient.

    Arguments as in `fused_svr_loss`; with `normalize`, forces act on the normalised rows.
    """
    check_choices(objective=objective, bilateral=bilateral)
    alpha, beta, dtype = (
        as_python_number(alpha),
        as_python_number(beta),
        accumulator_dtype(audio.dtype),
    )
    infonce, N = objective == "infonce", len(text)
    A, T = constant(audio, audio, dtype), constant(text, audio, dtype)
    if normalize:
        A, T = F.normalize(A, dim=1), F.normalize(T, dim=1)
    R = None if radius is None else constant(radius, audio, dtype).expand(N)
    k = constant(logit_scale, audio, dtype)
    b = constant(0.0 if logit_bias is None else logit_bias, audio, dtype)
    w = A.new_ones(N) if weight is None else constant(weight, audio, dtype)
    keep = kept_pairs(N, ids, audio.device)
    positive = torch.eye(N, dtype=torch.bool, device=audio.device)
    with torch.enable_grad():
        T = T.requires_grad_()
        through_positives = through_negatives = A.new_zeros(())
        directions = directions_of(T, A, R, infonce, bilateral, renormalize)
        for term, pairs in directions.items():
            for X, Y, _ in pairs:
                logits = k * X @ Y.t()
                leaf = logits.detach().requires_grad_()
                rows = infonce_rows(leaf, keep) if infonce else siglip_rows(leaf + b, keep)
                factor = alpha if term == "svr" else 1.0
                (slope,) = torch.autograd.grad((factor * w * rows).sum(), leaf)
                through_positives = through_positives + (logits * slope)[positive].sum()
                through_negatives = through_negatives + (logits * slope)[~positive].sum()
        pull = -torch.autograd.grad(through_positives, T, retain_graph=True)[0]
        push = -torch.autograd.grad(through_negatives, T)[0]
    T = T.detach()
    r, u = gap_and_direction(T, A)
    force = pull + push
    if R is not None:
        force = force - (beta * w * (R > r))[:, None] * u
    parallel = (push * u).sum(dim=1)
    return ForceDecomposition(
        force,
        pull,
        push,
        parallel,
        torch.linalg.vector_norm(push - parallel[:, None] * u, dim=1),
        F.cosine_similarity(force, A, dim=1),
        F.cosine_similarity(force, u, dim=1),
        torch.ones_like(r) if R is None else 1.0 - R / r,
    )
