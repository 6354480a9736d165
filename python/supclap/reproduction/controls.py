"""Controls: losses that have one part of what support vectors do, and not the rest.

A term of support vectors x_i + c (y_i - x_i) brings several things: the weight of a second term,
logits between embeddings of one modality, and a push of the negatives of which the part across the
step to the partner is smaller. Here the share c is fixed, the step is a constant, and the gradient
of x_i across the step is multiplied by a number of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from supclap_kernels import Negatives, SVRLoss
from supclap_kernels.reference import gap_and_direction, infonce_rows, kept_pairs

from ..config import TrainConfig


class Term(NamedTuple):
    """One more term of both directions."""

    share: float
    """c: how far the support vectors are from x_i, in units of the gap"""
    across: float
    """the factor on their gradient across the step; SVR has 1 - c"""


CONTROLS = {
    "R = 0": Term(0.0, 1.0),
    "logits of one modality": Term(0.5, 1.0),
    "these, and a smaller push across": Term(0.5, 0.5),
    "these, and no push across": Term(0.5, 0.0),
    "a pull of twice the force": None,
}


class Control(SVRLoss):
    """InfoNCE and one more term, in eager PyTorch; None: that of the positives' logits again."""

    def __init__(self, term: Term | None, renormalize: bool) -> None:
        super().__init__(return_stats=True)
        self.term, self.on_sphere = term, renormalize

    def forward(
        self,
        audio: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        ids: Tensor | None = None,
        weight: Tensor | None = None,
        negatives: Negatives | None = None,
    ) -> Any:
        """The loss and SVRStats of audio, text (N, D), without weights and further negatives."""
        loss, stats = super().forward(audio, text, logit_scale, ids=ids)
        keep = kept_pairs(len(text), ids, text.device)
        for x, y in ((text, audio), (audio, text)):
            if self.term is None:
                rows = pull_again(logit_scale * x @ y.t(), keep)
            else:
                support = self.support_vectors(x, y, self.term)
                rows = infonce_rows(logit_scale * support @ y.t(), keep)
            loss = loss + rows.mean()
        return loss, stats

    def support_vectors(self, x: Tensor, y: Tensor, term: Term) -> Tensor:
        """(N, D), of which x_i alone gets a gradient."""
        r, u = gap_and_direction(x.detach(), y.detach())
        change = x - x.detach()  # zero, with the gradient of x
        along = (change * u).sum(dim=1, keepdim=True) * u
        change = along + term.across * (change - along)
        moved = x.detach() + term.share * r[:, None] * u + change
        return nn.functional.normalize(moved, dim=1) if self.on_sphere else moved


def pull_again(logits: Tensor, keep: Tensor) -> Tensor:
    """(N,): rows whose gradient is that of InfoNCE through the positives' logits alone."""
    with torch.no_grad():
        missing = 1 - logits.masked_fill(~keep, float("-inf")).softmax(dim=1).diagonal()
    return -missing * logits.diagonal()


def build_control(config: TrainConfig, name: str) -> Control:
    return Control(CONTROLS[name], config.support == "sphere")
