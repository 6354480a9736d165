"""Two small transformers into one space of unit vectors, and their checkpoint.

Padding never changes an embedding: padded positions are zero before the first layer, masked in
attention and left out of the pooling.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import ModelConfig, UserError, read_model_config
from .data import N_MELS


def positions(length: int, width: int, like: Tensor) -> Tensor:
    """[length, width]: sines and cosines, so that any length has a position."""
    rates = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(1e4) / width))
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


class Block(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [B, L, W]; mask: [B, L] bool, True where a token is real."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, W / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """Tokens -> transformer -> mean over the real tokens -> projection -> unit vector."""

    def __init__(self, width: int, heads: int, layers: int, embed_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, embed_dim)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [B, L, W]; mask: [B, L] bool -> [B, D]."""
        x = x + positions(x.shape[1], x.shape[2], x)
        for block in self.blocks:
            x = block(x, mask)
        real = mask[:, :, None].to(x.dtype)
        pooled = (self.norm(x) * real).sum(dim=1) / real.sum(dim=1)
        return F.normalize(self.project(pooled), dim=1)


class AudioEncoder(nn.Module):
    """Log-mel frames, normalised per bin, cut into patches along time."""

    mel_mean: Tensor
    mel_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_frames = config.patch_frames
        self.register_buffer("mel_mean", torch.zeros(N_MELS))
        self.register_buffer("mel_std", torch.ones(N_MELS))
        self.patch = nn.Linear(config.patch_frames * N_MELS, config.width)
        self.tower = Tower(config.width, config.heads, config.audio_layers, config.embed_dim)

    def set_statistics(self, features: list[Tensor]) -> None:
        """Mean and deviation of each mel bin over a corpus (CED's batch norm, once for all)."""
        frames = sum(len(clip) for clip in features)
        mean = sum((c.double().sum(dim=0) for c in features), torch.zeros(N_MELS).double()) / frames
        squares = sum(((c.double() - mean).square().sum(dim=0) for c in features), mean * 0)
        self.mel_mean.copy_(mean)
        self.mel_std.copy_((squares / frames).sqrt().clamp(min=1.0))

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """mel: [B, F, N_MELS] decibels; lengths: [B] real frames -> [B, D]."""
        size = self.patch_frames
        mel = F.pad(mel, (0, 0, 0, -mel.shape[1] % size))
        real = torch.arange(mel.shape[1], device=mel.device) < lengths[:, None]
        mel = (mel - self.mel_mean) / self.mel_std * real[:, :, None]
        patches = mel.unflatten(1, (-1, size)).flatten(2)  # [B, F / size, size * N_MELS]
        return self.tower(self.patch(patches), real[:, ::size])


class TextEncoder(nn.Module):
    """Bytes -> detectors of short byte runs -> the strongest hit of every POOL bytes."""

    POOL = 4

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(257, config.width // 2, padding_idx=0)
        self.runs = nn.Conv1d(config.width // 2, config.width, kernel_size=7, padding=3)
        self.tower = Tower(config.width, config.heads, config.text_layers, config.embed_dim)

    def forward(self, text: Tensor) -> Tensor:
        """text: [B, L] int64, bytes plus 1, 0 where padded -> [B, D]."""
        text = F.pad(text, (0, -text.shape[1] % self.POOL))
        real = text > 0
        hits = F.relu(self.runs(self.embed(text).transpose(1, 2)))
        return self.tower(F.max_pool1d(hits, self.POOL).transpose(1, 2), real[:, :: self.POOL])


class SupclapModel(nn.Module):
    """Both encoders, the logit scale 1 / tau, and the bias of the sigmoid objective."""

    def __init__(self, config: ModelConfig, tau: float = 0.07) -> None:
        super().__init__()
        self.config = config
        self.audio = AudioEncoder(config)
        self.text = TextEncoder(config)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(tau)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0), requires_grad=False)

    @property
    def logit_scale(self) -> Tensor:
        """0-d: the factor of every inner product."""
        return self.log_scale.exp()


def save_checkpoint(path: Path, model: SupclapModel) -> None:
    """Write all tensors; an interrupted write leaves the previous file as it was."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def load_checkpoint(run: Path) -> SupclapModel:
    """The model of a run, ready to embed."""
    model = SupclapModel(read_model_config(run / "config.json"))
    path = run / "model.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise UserError(f"{run} has no {path.name}: it ended before its first checkpoint") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}") from error
    return model.eval()
