"""A lean training loop for audio-text contrastive models with the SVR loss."""

from .config import Interrupted, ModelConfig, TrainConfig, UserError

__all__ = ["Interrupted", "ModelConfig", "TrainConfig", "UserError"]
