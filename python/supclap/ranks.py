"""Where a run runs: its device, its threads, and the processes that torchrun started."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import UserError

PATIENCE = timedelta(hours=2)  # while the first rank validates, the others wait


class Ranks:
    """The processes of this run: one, or those that torchrun started."""

    def __init__(self, device: torch.device) -> None:
        self.count, self.rank, self.group = int(os.environ.get("WORLD_SIZE", "1")), 0, None
        if self.count > 1:
            if not dist.is_initialized():
                backend = "nccl" if device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=PATIENCE)
            self.rank, self.group = dist.get_rank(), dist.group.WORLD

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def sum(self, x: Tensor) -> Tensor:
        """Over ranks, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether it is set on some rank."""
        if self.count == 1:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return bool(self.sum(torch.tensor(float(flag), device=device)) > 0)

    def each(self, value: Any) -> list[Any]:
        """A value of every rank, on every rank."""
        if self.count == 1:
            return [value]
        found = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def rows(self, x: Tensor) -> Tensor:
        """Rows of every rank, in their order."""
        return torch.cat(self.each(x.cpu())).to(x.device) if self.count > 1 else x

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """As DistributedDataParallel does, after backward."""
        if self.count == 1:
            return
        for p in parameters:  # a layer may have been dropped here and not elsewhere
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        found = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([g.flatten() for g in found])) / self.count
        for g, mean in zip(found, flat.split([g.numel() for g in found]), strict=True):
            g.copy_(mean.view_as(g))


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one, with torchrun that of this rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch finds no CUDA device; use --device cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def set_threads(count: int | None) -> None:
    """CPU threads of PyTorch; None leaves its own choice."""
    if count is not None and count < 1:
        raise UserError(f"--threads must be at least 1, got {count}")
    if count is not None:
        torch.set_num_threads(count)


@contextlib.contextmanager
def stop_asked() -> Iterator[threading.Event]:
    """Set by Ctrl-C or SIGTERM, so that a step ends before the run does; a second one ends it."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
