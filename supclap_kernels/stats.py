"""What a training run wants to see of the loss: detached means from the same pass."""

from typing import NamedTuple

import torch
from torch import Tensor


class SVRStats(NamedTuple):
    """0-d tensors without gradient. Means over rows; terms carry `weight` but neither alpha nor
    beta.
    """

    l_t2a: Tensor
    """text-to-audio term (SigLIP: the whole base term)"""
    l_a2t: Tensor
    """audio-to-text term (SigLIP: 0)"""
    l_svr: Tensor
    """support vector term, both directions of it where `bilateral` has two"""
    l_cons: Tensor
    """radius constraint relu(R - r) + relu(-R)"""
    recall_t2a: Tensor
    """fraction of texts whose audio scores above every other; ties count against it"""
    recall_a2t: Tensor
    positive_similarity: Tensor
    """mean <t_i, a_i>"""
    negative_similarity: Tensor
    """mean <t_i, a_j> over negatives; NaN without any"""
    radius: Tensor
    """mean R; NaN without a radius, like the two below"""
    gap: Tensor
    """mean r"""
    contraction: Tensor
    """mean 1 - R / r, the factor on the perpendicular part of the SVR gradient"""

    @classmethod
    def from_matrix(
        cls,
        terms: list[Tensor],
        S: Tensor,
        k: Tensor,
        b: Tensor,
        keep: Tensor,
        R: Tensor | None,
        r: Tensor | None,
    ) -> "SVRStats":
        """From the (N, N) similarities; `terms` are the four means of the loss, `keep` the counted
        pairs.
        """
        S = S.detach()
        others = keep & ~torch.eye(len(S), dtype=torch.bool, device=S.device)
        positive = S.diagonal()
        logits = k.detach() * S + b.detach()
        beats = logits.ge(logits.diagonal()[:, None]) & others
        beats_column = logits.ge(logits.diagonal()[None, :]) & others
        nan = torch.full((), float("nan"), dtype=S.dtype, device=S.device)
        values = [
            *terms,
            1.0 - beats.any(dim=1).to(S.dtype).mean(),
            1.0 - beats_column.any(dim=0).to(S.dtype).mean(),
            positive.mean(),
            (S * others).sum() / others.sum(),
            nan if R is None else R.mean(),
            nan if r is None else r.mean(),
            nan if R is None or r is None else (1.0 - R / r).mean(),
        ]
        return cls(*(value.detach() for value in values))
