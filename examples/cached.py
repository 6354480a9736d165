"""Batches larger than memory (GradCache): `cached_step` encodes them chunk by chunk.

    python examples/cached.py --out runs/cached && ... --resume

Changed lines are marked SVR.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supclap_kernels import DynamicRadius, SVRLoss, attach_radius, cached_step  # SVR

from toy import Towers, batch, command_line


def train(out: Path, steps: int, resume: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Towers()
    radius = DynamicRadius(init=1.0, features="summary")  # SVR
    attach_radius(model, radius)  # SVR: before the optimizer
    criterion = SVRLoss(radius, beta=1.0)  # SVR
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start, path = 0, out / "checkpoint.pt"
    if resume:
        checkpoint = torch.load(path)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]

    def loss(audio: Tensor, text: Tensor) -> Tensor:
        rows = F.normalize(audio, dim=1), F.normalize(text, dim=1)
        return criterion(*rows, model.log_scale.exp().sum())  # SVR

    for step in range(start, steps):
        optimizer.zero_grad()
        cached_step([model.audio, model.text], batch(step), loss, chunk_size=4)  # SVR
        optimizer.step()
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}
    torch.save(checkpoint, path)
    return model, optimizer


if __name__ == "__main__":
    command_line(train)
