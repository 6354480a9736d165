"""FSDP2: `fully_shard(model)` shards the radius with the model that it hangs on.

    torchrun --nproc-per-node 2 examples/fsdp2.py --out runs/fsdp2 && ... --resume

Changed lines are marked SVR.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from supclap_kernels import StaticRadius, SVRLoss, attach_radius  # SVR

from toy import Towers, batch, command_line


def train(out: Path, steps: int, resume: bool = False) -> tuple[nn.Module, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Towers()
    radius = attach_radius(model, StaticRadius(1.0))  # SVR: before fully_shard
    mesh = init_device_mesh("cpu", (world,))
    for tower in (model.audio, model.text):
        fully_shard(tower, mesh=mesh)
    fully_shard(model, mesh=mesh)  # keeps its own parameters, the radius too, until backward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    criterion = SVRLoss(radius, beta=1.0, group=dist.group.WORLD)  # SVR
    start, path = 0, out / "checkpoint.pt"
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    if resume:
        saved = torch.load(path)
        states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
        set_state_dict(model, optimizer, **states, options=whole)
        start = saved["step"]
    for step in range(start, steps):
        optimizer.zero_grad()
        criterion(*model(*batch(step, rank, world))).backward()
        optimizer.step()
    kept = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = get_state_dict(model, optimizer, options=kept)
    if rank == 0:
        torch.save({"model": states[0], "optimizer": states[1], "step": steps}, path)
    dist.barrier()
    return model, optimizer


if __name__ == "__main__":
    dist.init_process_group("gloo")
    command_line(train)
    dist.destroy_process_group()
