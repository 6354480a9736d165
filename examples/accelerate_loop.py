"""accelerate: `prepare` wraps the model, and save_state and load_state keep what it wraps.

    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py --out runs/accelerate

Changed lines are marked SVR. Without `accelerate launch` it runs in one process.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from supclap_kernels import StaticRadius, SVRLoss, attach_radius  # SVR

from toy import Towers, batch, command_line


def train(out: Path, steps: int, resume: bool = False) -> tuple[nn.Module, Any]:
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    model = Towers()
    radius = attach_radius(model, StaticRadius(1.0))  # SVR: before prepare and the optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    criterion = SVRLoss(radius, beta=1.0, group=dist.group.WORLD if world > 1 else None)  # SVR
    start, folder = 0, out / "state"
    if resume:
        accelerator.load_state(str(folder))
        start = torch.load(out / "step.pt")
    for step in range(start, steps):
        optimizer.zero_grad()
        accelerator.backward(criterion(*wrapped(*batch(step, rank, world))))
        optimizer.step()
    accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        torch.save(steps, out / "step.pt")
    return model, optimizer


if __name__ == "__main__":
    command_line(train)
