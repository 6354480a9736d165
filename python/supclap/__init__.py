"""A lean training loop for audio-text contrastive models with the SVR loss."""

from .config import ModelConfig, TrainConfig
from .errors import Interrupted, UserError

__all__ = ["Interrupted", "ModelConfig", "TrainConfig", "UserError"]
