"""A loss module for sentence-transformers' trainer: pairs (anchor, positive), both directions, and
hard negatives in further columns.

    radius = sk.attach_radius(model, sk.StaticRadius(1.0))
    loss = MultipleNegativesSymmetricRankingLoss(model, radius=radius, beta=1.0)
    SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss)

Attached to the model, the radius is saved and resumed with it, and is the same on all ranks.

The value is that of the library's class of this name with its default similarity, cosine (from
version 6 on: MultipleNegativesRankingLoss with both directions, partition_mode="per_direction").
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..groups import WORLD, is_initialized
from ..negatives import Negatives
from ..options import as_python_number
from .contrast import Contrast


class MultipleNegativesSymmetricRankingLoss(nn.Module):
    """Cross entropies of anchors among positives and all negatives, and of positives among anchors,
    averaged.

    Args:
        model: a SentenceTransformer: features -> {"sentence_embedding": (N, D)}.
        scale: what similarities are multiplied with, 1 / temperature.
        similarity_fct: cosine (the default) or dot product: the library's `cos_sim` or `dot_score`,
            or one of their names. They say `normalize`.
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
        similarity_fct: Any = None,
        gather_across_devices: bool = False,
        *,
        radius: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model, self.scale = model, as_python_number(scale)
        options["normalize"] = is_cosine(similarity_fct, options.get("normalize"))
        self.gathers = gather_across_devices and "group" not in options
        self.contrast = Contrast(radius, False, 0, 1, **options)

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        rows = [self.model(features)["sentence_embedding"] for features in sentence_features]
        if len(rows) < 2:
            raise ValueError(f"columns anchor, positive, negative, ... are needed, got {len(rows)}")
        negatives = Negatives(text=torch.cat(rows[2:])) if rows[2:] else None
        if self.gathers:
            self.contrast.criterion.group = WORLD if is_initialized() else None
        return self.contrast(rows[0], rows[1], self.scale, negatives=negatives)

    def get_config_dict(self) -> dict[str, Any]:
        """What the trainer writes into a model card."""
        criterion = self.contrast.criterion
        return {
            "scale": self.scale,
            "similarity_fct": "cos_sim" if criterion.options["normalize"] else "dot_score",
            "gather_across_devices": self.gathers,
            "group": criterion.handle.name,
            **{name: as_python_number(value) for name, value in criterion.options.items()},
        }


COSINE, DOT = ("cos_sim", "pytorch_cos_sim", "cosine"), ("dot_score", "dot", "dot_product")


def is_cosine(similarity: Any, normalize: bool | None) -> bool:
    """Which of the library's two similarities of inner products is meant; ValueError for others."""
    if similarity is None:
        return normalize is None or bool(normalize)
    name = getattr(similarity, "value", similarity)  # of its enumeration
    if (getattr(similarity, "__module__", None) or "").startswith("sentence_transformers."):
        name = getattr(similarity, "__name__", name)
    if name in COSINE or name in DOT:
        if normalize is not None and bool(normalize) != (name in COSINE):
            raise ValueError(
                f"normalize={normalize} and similarity_fct={name} contradict each other: cosine "
                "normalizes, the dot product does not; pass one of them"
            )
        return name in COSINE
    raise ValueError(
        "similarity_fct must be cos_sim ('cosine') or dot_score ('dot') of sentence_transformers, "
        f"got {similarity!r}: the kernels compare rows by inner products; for another similarity "
        "use the library's own loss"
    )
