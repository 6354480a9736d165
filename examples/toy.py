"""What the examples share: towers, batches that a step's number decides, and a command line."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 16


class Towers(nn.Module):
    """Stands for your model: two encoders and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.text = nn.Linear(24, 16), nn.Linear(20, 16)
        self.log_scale = nn.Parameter(torch.full((1,), 2.5))

    def forward(self, audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = F.normalize(self.audio(audio), dim=1), F.normalize(self.text(text), dim=1)
        return *rows, self.log_scale.exp().sum()


def batch(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """Stands for your data: this rank's rows of a step's batch of pairs."""
    generator = torch.Generator().manual_seed(step)
    common = torch.randn(BATCH, 20, generator=generator)
    audio = torch.cat((common, torch.randn(BATCH, 4, generator=generator)), dim=1)
    return audio.chunk(world)[rank], common.chunk(world)[rank]


def command_line(train: Callable[[Path, int, bool], tuple[nn.Module, Any]]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/example"), help="for checkpoints")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model, _ = train(given.out, given.steps, given.resume)
    values = {n: p for n, p in model.named_parameters() if "supclap_radius" in n}
    print({name: p.detach().flatten()[:1] for name, p in values.items()})
