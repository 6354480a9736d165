"""Plain PyTorch, DistributedDataParallel: negatives of all ranks, one radius.

    torchrun --nproc-per-node 2 examples/ddp.py --out runs/ddp && ... --resume

Changed lines are marked SVR. Without torchrun it runs in one process, with the same result.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from supclap_kernels import DynamicRadius, SVRLoss, attach_radius  # SVR

from toy import Towers, batch, command_line


def train(out: Path, steps: int, resume: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    across = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if across else (0, 1)
    torch.manual_seed(0)
    model = Towers()
    radius = attach_radius(model, DynamicRadius(init=1.0, features="summary"))  # SVR: before DDP
    wrapped = DistributedDataParallel(model) if across else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    criterion = SVRLoss(radius, beta=1.0, group=dist.group.WORLD if across else None)  # SVR
    start, path = 0, out / "checkpoint.pt"
    if resume:
        checkpoint = torch.load(path)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    for step in range(start, steps):
        optimizer.zero_grad()
        criterion(*wrapped(*batch(step, rank, world))).backward()
        optimizer.step()
    if rank == 0:
        checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**checkpoint, "step": steps}, path)
    return model, optimizer


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    command_line(train)
    if dist.is_initialized():
        dist.destroy_process_group()
