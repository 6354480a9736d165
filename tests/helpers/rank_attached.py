"""A radius on a model that is wrapped afterwards: what two ranks end with."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import supclap_kernels as sk


class Towers(nn.Module):
    """A model that its trainer calls, and that never heard of a radius."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.audio, self.text = nn.Linear(7, 5), nn.Linear(6, 5)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = F.normalize(self.audio(audio), dim=1), F.normalize(self.text(text), dim=1)
        return *rows, self.log_scale.exp()


def batch(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(8, 7, generator=generator), torch.randn(8, 6, generator=generator)
    return rows[0].chunk(world)[rank], rows[1].chunk(world)[rank]


def radius_of(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "static":
        return sk.StaticRadius()
    return sk.DynamicRadius(features="summary", hidden=(4, 4))


def trained(rank: int, world: int, kind: str, across: bool, **wrapping: Any) -> list[Tensor]:
    """The radius after four steps; across: the loss is that of all ranks' rows."""
    model = Towers()
    radius = sk.attach_radius(model, radius_of(kind))
    wrapped: nn.Module = model
    if world > 1:
        wrapped = DistributedDataParallel(model, **wrapping)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for step in range(4):
        # Built anew, from the wrapped model: the radius is the one that hangs there.
        criterion = sk.SVRLoss(
            sk.attach_radius(wrapped, radius_of(kind)),
            group=dist.group.WORLD if across and world > 1 else None,
        )
        assert criterion.radius is radius
        optimizer.zero_grad()
        criterion(*wrapped(*batch(step, rank, world))).backward()
        optimizer.step()
    return [p.detach().clone() for p in radius.parameters()]
