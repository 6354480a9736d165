"""What several encoders are made of.

Padding never changes an embedding: padded positions are masked in attention and left out of the
pooling.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def positions(length: int, width: int, like: Tensor) -> Tensor:
    """Returns sines and cosines, so that any length has a position: [length, width]."""
    rates = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(1e4) / width))
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


class Block(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps)
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


def bin_statistics(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns mean and variance [M] of each bin over all frames of clips [F_c, M], in float64."""
    frames = sum(len(clip) for clip in features)
    sums = torch.stack([clip.double().sum(dim=0) for clip in features])
    mean = sums.sum(dim=0) / frames
    squares = torch.stack([(clip.double() - mean).square().sum(dim=0) for clip in features])
    return mean, squares.sum(dim=0) / frames


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Averages x: [B, L, W] over the real tokens of mask: [B, L]; each row has one -> [B, W]."""
    real = mask[:, :, None].to(x.dtype)
    return (x * real).sum(dim=1) / real.sum(dim=1)
