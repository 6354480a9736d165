"""The part of a SentenceTransformer that holds its radius; see `attach_radius`.

The one module here that imports the library it serves, when a radius is attached to such a model:
its trainer loads a checkpoint's parts without trust_remote_code if they are of the library's class.
"""

from typing import Any

from sentence_transformers.base.modules import Module
from torch import nn

from ..radius import SavedRadius


class RadiusPart(Module):  # type: ignore[misc, unused-ignore]
    """Hands on the features it gets, and is saved and loaded with the model's other parts."""

    def __init__(self, radius: nn.Module) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return features

    def save(
        self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> "RadiusPart":
        """The tensors of the saved radius, until `attach_radius` puts a radius in their place."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {name: kwargs[name] for name in names if name in kwargs}
        state = cls.load_torch_weights(model_name_or_path, *args, **where)
        return cls(SavedRadius({name.removeprefix("radius."): x for name, x in state.items()}))
