"""What the paper argues with, measured in training: where a step pushes the texts of a batch, and
where it takes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from supclap_kernels import SVRLoss, force_decomposition

from .batches import Batch
from .model import SupclapModel, Tower, evaluating
from .ranks import Ranks

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Those that a line has of a distribution."""


def spread(x: Tensor) -> list[float]:
    """Returns the quantiles of [N] numbers."""
    points = torch.tensor(QUANTILES, dtype=torch.float64)
    return torch.quantile(x.detach().double().cpu(), points).tolist()


class Diagnosis:
    """The diagnosis of one step, on every rank: made before it from the batch, finished after."""

    def __init__(
        self, model: SupclapModel, criterion: SVRLoss, batch: Batch, size: int | None, ranks: Ranks
    ) -> None:
        self.model, self.batch, self.size, self.ranks = model, batch, size, ranks
        self.audio = ranks.rows(self.embed(model.audio, batch.audio))
        self.captions = tuple(x[: batch.pairs] for x in batch.text)
        self.text = ranks.rows(self.embed(model.text, self.captions))
        scale, bias = model.logit_scale, None
        options: dict[str, Any] = {
            name: criterion.options[name]
            for name in ("objective", "bilateral", "alpha", "renormalize")
        }
        if options["objective"] == "siglip":
            bias = model.logit_bias
        radius = None
        with torch.no_grad():
            if criterion.radius is not None:
                radius = criterion.radius(self.audio, self.text, scale).expand(len(self.text))
        options["ids"] = None if batch.ids is None else ranks.rows(batch.ids)
        pair = (self.audio, self.text)
        forces = force_decomposition(
            *pair, radius, scale, bias, beta=criterion.options["beta"], **options
        )
        without_svr = force_decomposition(*pair, None, scale, bias, **options)
        length = torch.linalg.vector_norm
        gap = length(self.audio - self.text, dim=1)
        self.direction = (self.audio - self.text) / gap[:, None].clamp(min=1e-12)
        self.line: dict[str, Any] = {
            "drift_audio": forces.drift_audio.mean(),  # cos of the force with the audio
            "drift_gap": forces.drift_gap.mean(),  # ... with the direction to it
            "drift_gap_without_svr": without_svr.drift_gap.mean(),
            "force": length(forces.force, dim=1).mean(),
            "pull": length(forces.pull, dim=1).mean(),
            "push_parallel": forces.parallel.mean(),
            "push_perpendicular": forces.perpendicular.mean(),
            "push_perpendicular_without_svr": without_svr.perpendicular.mean(),
            "contraction": forces.contraction.mean(),
        }
        self.line = {name: float(value) for name, value in self.line.items()}
        self.line["gap"] = spread(gap)
        self.line["radius"] = None if radius is None else spread(radius)
        self.line["positive_similarity"] = spread((self.audio * self.text).sum(dim=1))

    def embed(self, tower: Tower, inputs: tuple[Tensor, ...]) -> Tensor:
        """Embeds a batch as in evaluation."""
        size = self.size or len(inputs[0])
        with evaluating(self.model, inference=False):
            parts = zip(*(x.split(size) for x in inputs), strict=True)
            return torch.cat([tower(*part) for part in parts])

    def finish(self) -> dict[str, Any]:
        """Adds, after the step, the cosines of the change it made to each text."""
        change = self.ranks.rows(self.embed(self.model.text, self.captions)) - self.text
        self.line["update_audio"] = float(F.cosine_similarity(change, self.audio, dim=1).mean())
        self.line["update_gap"] = float(F.cosine_similarity(change, self.direction, dim=1).mean())
        return self.line
