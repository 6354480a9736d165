"""A loss module for sentence-transformers' trainer: pairs (anchor, positive), both directions.

    radius = sk.attach_radius(model, sk.StaticRadius())
    loss = MultipleNegativesSymmetricRankingLoss(model, radius=radius)
    SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss)

Attached to the model, the radius is saved and resumed with it, and is the same on all ranks.

The value is that of the library's class of this name with its default similarity, cosine (from
version 6 on: MultipleNegativesRankingLoss with both directions, partition_mode="per_direction").
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..groups import WORLD, is_initialized
from .contrast import Contrast


class MultipleNegativesSymmetricRankingLoss(nn.Module):
    """Cross entropies of anchors among positives and of positives among anchors, averaged.

    Args:
        model: a SentenceTransformer: features -> {"sentence_embedding": (N, D)}.
        scale: what cosines are multiplied with, 1 / temperature.
        radius: a module such as StaticRadius(), or None. Support vectors move the positives, the
            second column, towards their anchors.
        gather_across_devices: negatives from every rank of the default process group, which is
            looked up at each call; where there is none, this process' own. A `group` among the
            options says the same of another group.
        **options: of `SVRLoss`.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        *,
        radius: nn.Module | None = None,
        gather_across_devices: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model, self.scale = model, scale
        self.gathers = gather_across_devices and "group" not in options
        self.contrast = Contrast(radius, False, 0, 1, **{"normalize": True, **options})

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        rows = [self.model(features)["sentence_embedding"] for features in sentence_features]
        if len(rows) != 2:
            raise ValueError(f"pairs (anchor, positive) are needed, got {len(rows)} columns")
        if self.gathers:
            self.contrast.criterion.group = WORLD if is_initialized() else None
        return self.contrast(rows[0], rows[1], self.scale)

    def get_config_dict(self) -> dict[str, Any]:
        """What the trainer writes into a model card."""
        return {
            "scale": self.scale,
            "gather_across_devices": self.gathers,
            "group": self.contrast.criterion.handle.name,
            **self.contrast.criterion.options,
        }
