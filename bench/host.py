"""`python -m bench.host [--out FILE]`: microseconds that a step of a small batch costs the host.

Without a device: the checks, autograd and the "cuda" backend as they are, on CPU tensors, with
launches that do nothing, as on an H200. With one: the same calls, until the device is done. Beside
it a Function that does nothing and takes the same tensors: the least that autograd takes.
"""

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import supclap_kernels as sk
from supclap_kernels import native

from . import timer
from .machine import environment

H200 = 132, 227 * 1024
"""Multiprocessors, and bytes of shared memory of a block."""
ROUNDS, STEPS = 21, 100


class NoDevice(native.Unlaunched):
    """The CUDA module without launches, and with the numbers of a device."""

    def plan_single(self, *arguments: Any) -> Any:
        return self.launchers.plan_single(*arguments, *H200)

    def single_limit(self, *arguments: Any) -> Any:
        return self.launchers.single_limit(*arguments, *H200)


def without_device() -> None:
    """From now on backend="cuda" takes CPU tensors, and computes nothing."""
    native.module().cuda.pretend(*H200)
    native.stand_in(NoDevice(native.module().cuda))


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[-1].new_empty(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def measure(N: int, D: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Medians of interleaved rounds, in microseconds."""
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2, N, D, device=device), dim=2).to(dtype)
    numbers = 0.1 + 0.1 * torch.rand(N, device=device), torch.tensor(14.0, device=device)
    leaves = [x.detach().requires_grad_() for x in (*rows, *numbers)]

    def forward() -> Tensor:
        return sk.fused_svr_loss(*leaves, backend="cuda")

    calls: dict[str, timer.Call] = {
        "nothing": lambda: torch.autograd.grad(Nothing.apply(*leaves), leaves),
        "no_grad": torch.no_grad()(forward),
        "forward": forward,
        "step": lambda: torch.autograd.grad(forward(), leaves),
    }
    wait = torch.cuda.synchronize if device == "cuda" else None
    samplers = {
        name: functools.partial(timer.wall_ms, call, STEPS, wait) for name, call in calls.items()
    }
    for sampler in samplers.values():  # a warm-up
        sampler()
    times_ms = timer.interleave(samplers, ROUNDS)
    return {name: round(1e3 * statistics.median(spent), 1) for name, spent in times_ms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        without_device()
    microseconds = {
        f"N = {N}, D = {D}, {str(dtype)[6:]}": measure(N, D, dtype, device)
        for N, D, dtype in ((24, 1024, torch.float32), (1024, 512, torch.bfloat16))
    }
    result = {"machine": environment(), "device": device, "microseconds": microseconds}
    text = json.dumps(result, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
