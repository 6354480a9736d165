"""The built-in pair: two small transformers that train on a CPU, from log-mels and from bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio import N_MELS, LogMel
from .config import ModelConfig
from .layers import Block, bin_statistics, masked_mean, positions


class Transformer(nn.Module):
    """A transformer, and the mean over its real tokens."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [B, L, W]; mask: [B, L] bool -> [B, W]."""
        x = x + positions(x.shape[1], x.shape[2], x)
        for block in self.blocks:
            x = block(x, mask)
        return masked_mean(self.norm(x), mask)


class AudioEncoder(nn.Module):
    """A transformer over log-mel frames, normalised per bin, cut into patches along time."""

    projects = False
    mel_mean: Tensor
    mel_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.front_end, self.width = LogMel(), config.width
        self.patch_frames = config.patch_frames
        self.register_buffer("mel_mean", torch.zeros(N_MELS))
        self.register_buffer("mel_std", torch.ones(N_MELS))
        self.patch = nn.Linear(config.patch_frames * N_MELS, config.width)
        self.transformer = Transformer(config.width, config.heads, config.audio_layers)

    def set_statistics(self, features: Callable[[], list[Tensor]]) -> None:
        """Sets mean and deviation of each mel bin by some clips (CED's batch norm, for good)."""
        mean, variance = bin_statistics(features())
        self.mel_mean.copy_(mean)
        self.mel_std.copy_(variance.sqrt().clamp(min=1.0))

    def lengths_of(self, mel: Tensor, lengths: Tensor) -> Tensor:
        return lengths

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """mel: [B, F, N_MELS] decibels; lengths: [B] real frames -> [B, W]."""
        size = self.patch_frames
        mel = F.pad(mel, (0, 0, 0, -mel.shape[1] % size))
        real = torch.arange(mel.shape[1], device=mel.device) < lengths[:, None]
        mel = (mel - self.mel_mean) / self.mel_std * real[:, :, None]
        patches = mel.unflatten(1, (-1, size)).flatten(2)  # [B, F / size, size * N_MELS]
        return self.transformer(self.patch(patches), real[:, ::size])


class Bytes:
    """The built-in tokenizer: UTF-8 bytes of the lower-cased text plus 1, padded with 0."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes

    def __call__(self, captions: list[str], languages: list[str]) -> tuple[Tensor, ...]:
        """Captions, whatever their languages -> [B, L] int64."""
        texts = [text.lower().encode()[: self.max_bytes] for text in captions]
        return (nn.utils.rnn.pad_sequence([torch.tensor(list(t)) + 1 for t in texts], True),)


class TextEncoder(nn.Module):
    """A transformer over the hits of detectors of short byte runs, the strongest of POOL bytes."""

    POOL = 4
    projects = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokenizer, self.width = Bytes(config.max_bytes), config.width
        self.embed = nn.Embedding(257, config.width // 2, padding_idx=0)
        self.runs = nn.Conv1d(config.width // 2, config.width, kernel_size=7, padding=3)
        self.transformer = Transformer(config.width, config.heads, config.text_layers)

    def lengths_of(self, text: Tensor) -> Tensor:
        return (text > 0).sum(dim=1)

    def forward(self, text: Tensor) -> Tensor:
        """text: [B, L] int64, bytes plus 1, 0 where padded -> [B, W]."""
        text = F.pad(text, (0, -text.shape[1] % self.POOL))
        real = text > 0
        hits = F.relu(self.runs(self.embed(text).transpose(1, 2)))
        return self.transformer(
            F.max_pool1d(hits, self.POOL).transpose(1, 2), real[:, :: self.POOL]
        )
