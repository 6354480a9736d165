"""An audio encoder that `supclap` does not know (Dasheng, BEATs, your own): three functions.

    supclap train --audio-encoder py:own_encoder:build ...     # from the folder of this file

`front_end(wave)` makes features [F, M] of samples, in any process; `forward(features, lengths)`
makes vectors [B, W] of a padded batch; `build()` returns the encoder. A run stores its weights;
what else it needs to be built again is in this file.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Wave:
    """What the encoder hears: mono samples as they are."""

    sample_rate = 16_000
    seconds = 10.0
    """Longer clips are cut."""
    key = "waves of 16 kHz"
    """Names the features: a cache keeps those of another key apart."""

    def __call__(self, wave: np.ndarray) -> Tensor:
        return torch.from_numpy(wave)[:, None]


class Encoder(nn.Module):
    """Stands for the model of a package, such as `dasheng.dasheng_base()`."""

    projects = False
    """Whether the vectors lie in a space that text shares already, as CLAP's do."""
    width = 64

    def __init__(self) -> None:
        super().__init__()
        self.front_end = Wave()
        self.filters = nn.Conv1d(1, self.width, kernel_size=400, stride=160)
        self.mixed = nn.Linear(self.width, self.width)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """features: [B, S, 1]; lengths: [B] real samples -> [B, width]. Padding is not heard."""
        waves = F.pad(features[..., 0], (0, max(0, 400 - features.shape[1])))
        frames = self.filters(waves[:, None]).square().clamp(min=1e-8).log().transpose(1, 2)
        count = ((lengths - 400) // 160 + 1).clamp(min=1)
        real = (torch.arange(frames.shape[1], device=frames.device) < count[:, None])[..., None]
        states = F.gelu(self.mixed(frames / math.sqrt(self.width))) * real
        return states.sum(dim=1) / count[:, None]


def build() -> Encoder:
    return Encoder()
