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
        beyond: dict[str, tuple[Tensor, Tensor | None]],
    ) -> "SVRStats":
        """From the (N, N) similarities; `terms` are the four means of the loss, `keep` the counted
        pairs, `beyond` those (N, M) with further negatives, audios and texts, and which count.
        """
        S = S.detach()
        others = keep & ~torch.eye(len(S), dtype=torch.bool, device=S.device)
        positive = S.diagonal()

        def logits(similarities: Tensor) -> Tensor:
            return k.detach() * similarities + b.detach()

        own = logits(positive)
        beaten_text = (logits(S).ge(own[:, None]) & others).any(dim=1)
        beaten_audio = (logits(S).ge(own[None, :]) & others).any(dim=0)
        total, count = (S * others).sum(), others.sum()
        for side, (more, kept) in beyond.items():
            more = more.detach()
            kept = torch.ones_like(more, dtype=torch.bool) if kept is None else kept
            beaten = (logits(more).ge(own[:, None]) & kept).any(dim=1)
            if side == "audio":
                beaten_text = beaten_text | beaten
            else:
                beaten_audio = beaten_audio | beaten
            total, count = total + (more * kept).sum(), count + kept.sum()
        nan = torch.full((), float("nan"), dtype=S.dtype, device=S.device)
        values = [
            *terms,
            1.0 - beaten_text.to(S.dtype).mean(),
            1.0 - beaten_audio.to(S.dtype).mean(),
            positive.mean(),
            total / count,
            nan if R is None else R.mean(),
            nan if r is None else r.mean(),
            nan if R is None or r is None else (1.0 - R / r).mean(),
        ]
        return cls(*(value.detach() for value in values))
