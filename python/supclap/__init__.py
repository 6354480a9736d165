"""A lean training loop for audio-text contrastive models with the SVR loss.

run = supclap.train(supclap.TrainConfig(data="train.csv", out="run"))
model = supclap.load(run)
model.similarity(["a dog barks", "rain"], ["a.wav", "b.flac"])  # cosines, [2, 2]
"""

import importlib
from typing import TYPE_CHECKING, Any

from .config import ModelConfig, TrainConfig
from .errors import Interrupted, UserError

if TYPE_CHECKING:
    from .interface import Embedder, load
    from .train import train

__all__ = [
    "Embedder",
    "Interrupted",
    "ModelConfig",
    "TrainConfig",
    "UserError",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports what needs PyTorch when it is asked for: `supclap --help` is quick."""
    places = {"Embedder": "interface", "load": "interface", "train": "train"}
    if name not in places:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{places[name]}", __name__)
    return module if name == "train" else getattr(module, name)
