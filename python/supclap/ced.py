"""CED, a vision transformer for audio tagging, as an encoder (Dinkel et al., arXiv 2308.11957).

Written from the paper and the layout of the published weights (`mispeech/ced-*`). Three
differences from the authors' program: padding is masked, so a clip's embedding does not depend on
its batch; a clip of several chunks is the mean of its real tokens, not of its chunks; and the batch
norm of the mel bins keeps its statistics in training (the published ones, or the corpus'), so that
ranks and pieces of a batch see the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio import N_MELS, LogMel
from .layers import Block, bin_statistics, masked_mean

SIZES = {"tiny": (192, 3), "mini": (256, 4), "small": (384, 6), "base": (768, 12)}
"""Channels and attention heads."""
PATCH = 16  # frames and mel bins
CHUNK = 1012  # frames that have a position; longer clips are cut into chunks


class CED(nn.Module):
    """Log-mel frames, batch norm for each bin, 16 x 16 patches with a position in time and one in
    frequency, `layers` transformer layers, mean over the tokens."""

    projects = False

    def __init__(self, width: int = 768, heads: int = 12, layers: int = 12) -> None:
        super().__init__()
        self.front_end, self.width = LogMel(), width
        self.init_bn = nn.BatchNorm2d(N_MELS, momentum=0.01)
        self.patch = nn.Conv2d(1, width, PATCH, PATCH)
        self.time = nn.Parameter(0.02 * torch.randn(1, width, 1, CHUNK // PATCH))
        self.frequency = nn.Parameter(0.02 * torch.randn(1, width, N_MELS // PATCH, 1))
        self.blocks = nn.ModuleList(Block(width, heads, eps=1e-6) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def set_statistics(self, features: Callable[[], list[Tensor]]) -> None:
        """Takes the statistics of the batch norm from some clips."""
        mean, variance = bin_statistics(features())
        assert self.init_bn.running_mean is not None and self.init_bn.running_var is not None
        self.init_bn.running_mean.copy_(mean)
        self.init_bn.running_var.copy_(variance.clamp(min=1.0))

    def lengths_of(self, mel: Tensor, lengths: Tensor) -> Tensor:
        return lengths

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """mel: [B, F, N_MELS] decibels; lengths: [B] real frames -> [B, W]."""
        frames = min(CHUNK, max(PATCH, mel.shape[1]))
        mel = F.pad(mel, (0, 0, 0, -mel.shape[1] % frames))
        chunks = mel.shape[1] // frames
        bn = self.init_bn
        x = F.batch_norm(
            mel.transpose(1, 2)[:, :, None], bn.running_mean, bn.running_var, bn.weight, bn.bias
        )  # [B, N_MELS, 1, F]
        real = torch.arange(mel.shape[1], device=mel.device) < lengths[:, None]
        x = (x * real[:, None, None]).transpose(1, 2)  # [B, 1, N_MELS, F]
        x = x.unflatten(3, (chunks, frames)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        x = self.patch(x)  # [B * chunks, W, N_MELS / PATCH, frames / PATCH]
        steps = x.shape[3]
        x = (x + self.time[..., :steps] + self.frequency).flatten(2).transpose(1, 2)

        # A patch is real if it has no padding; the first one of a clip always is.
        start = torch.arange(chunks, device=mel.device)[:, None] * frames
        ends = start + PATCH * torch.arange(1, steps + 1, device=mel.device)  # [chunks, steps]
        mask = ends <= lengths[:, None, None].clamp(min=PATCH)
        mask = mask.flatten(0, 1).repeat(1, N_MELS // PATCH)  # [B * chunks, tokens]
        seen = mask | ~mask.any(dim=1, keepdim=True)  # a chunk of padding sees itself
        for block in self.blocks:
            x = block(x, seen)
        x = self.norm(x).unflatten(0, (-1, chunks)).flatten(1, 2)  # [B, chunks * tokens, W]
        return masked_mean(x, mask.unflatten(0, (-1, chunks)).flatten(1))


NAMES = {
    "patch_embed.proj.": "patch.",
    "time_pos_embed": "time",
    "freq_pos_embed": "frequency",
    ".attn.qkv.": ".qkv.",
    ".attn.proj.": ".out.",
    ".mlp.fc1.": ".mlp.0.",
    ".mlp.fc2.": ".mlp.2.",
}


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames published weights for this module, without the tagging head and the front end."""
    translated = {}
    for name, tensor in state.items():
        for prefix in ("encoder.", "ced."):
            name = name.removeprefix(prefix)
        if name.startswith(("outputlayer.", "front_end.")):
            continue
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        translated[name] = tensor
    return translated
