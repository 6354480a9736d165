"""Where a run runs: its device, its threads, and the processes that torchrun started."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError

ECHO = 1.0  # seconds in which one Ctrl-C may arrive twice
PATIENCE = timedelta(hours=2)  # while the first rank validates, the others wait


def world_size() -> int:
    """Returns how many processes torchrun started: 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1")
    if text == "1":
        return 1
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    numeric = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    numbers = {name: os.environ.get(name, "") for name in numeric}
    wrong = [f"{name}={value}" for name, value in numbers.items() if not value.isdecimal()]
    if missing or wrong or not int(text) or not 0 < int(numbers["MASTER_PORT"]) < 2**16:
        problem = f"with {', '.join(wrong) or numbers}"
        if missing:
            problem = f"without {', '.join(missing)}"
        raise UserError(
            f"WORLD_SIZE={text} is set {problem}: start several processes with torchrun, or unset "
            "WORLD_SIZE for one"
        )
    if int(numbers["RANK"]) >= int(text):
        raise UserError(
            f"RANK={numbers['RANK']} is none of WORLD_SIZE={text} processes, counted from 0"
        )
    return int(text)


class Ranks:
    """The processes of this run: one, or those that torchrun started."""

    def __init__(self, device: torch.device) -> None:
        self.count, self.rank, self.group = world_size(), 0, None
        if self.count > 1:
            if not dist.is_initialized():
                backend = "nccl" if device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=PATIENCE)
            self.rank, self.group = dist.get_rank(), dist.group.WORLD

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def sum(self, x: Tensor) -> Tensor:
        """Sums over ranks, in place."""
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
        """Returns the value of every rank, on every rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def rows(self, x: Tensor) -> Tensor:
        """Returns the rows of every rank, in their order; some may have fewer."""
        if self.count == 1:
            return x
        counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(self.count)]
        dist.all_gather(counts, torch.full_like(counts[0], len(x)))
        sizes = [int(count) for count in counts]
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Averages gradients over ranks after backward, as DistributedDataParallel does."""
        if self.count == 1:
            return
        for p in parameters:  # a layer may have been dropped here and not elsewhere
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([g.flatten() for g in gradients])) / self.count
        for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(mean.view_as(g))


def choose_device(name: str) -> torch.device:
    """Returns the device: `auto` takes a GPU if there is one, with torchrun that of this rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch finds no CUDA device; use --device cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def lacks_bf16(device: torch.device) -> bool:
    """Whether this is a CPU without units for bfloat16, where it is slower than float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    return device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and not supported()


def set_threads(count: int | None) -> None:
    """Sets the CPU threads of PyTorch; None leaves its own choice."""
    if count is not None and count < 1:
        raise UserError(f"--threads must be at least 1, got {count}")
    if count is not None:
        torch.set_num_threads(count)


@contextlib.contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C or SIGTERM came, so that a step ends before the
    run does; a second Ctrl-C ends it.

    A batch system sends SIGTERM to every process of a job, and torchrun passes on what it gets: the
    same wish, heard twice. The second may come while the first is handled, so the handler sets
    a plain flag: threading.Event takes a lock.
    """
    asked, since = False, time.monotonic()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, frame: Any) -> None:
        nonlocal asked, since
        if asked and time.monotonic() - since > ECHO and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            since = time.monotonic()
        asked = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
