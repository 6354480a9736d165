"""What further negatives cost, beside eager PyTorch that concatenates them.

    python -m bench.negatives [--n 1024] [--m 7168] [--d 512] [--threads 2] [--out FILE]

In turns, forward and backward in float32 with detached negatives of both sides: InfoNCE and
one-sided SVR against eager PyTorch; then a queue as long as the batch against the loss without one.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import supclap_kernels as sk

from . import timer
from .machine import arguments, environment, write_json

SCALE = 1 / 0.07


def eager(audio: Tensor, text: Tensor, more: sk.Negatives, radius: float | None) -> Tensor:
    """As a user would write it."""
    assert more.audio is not None and more.text is not None
    audios, texts = torch.cat((audio, more.audio)), torch.cat((text, more.text))
    label = torch.arange(len(audio))
    loss = F.cross_entropy(SCALE * text @ audios.t(), label)
    loss = loss + F.cross_entropy(SCALE * audio @ texts.t(), label)
    if radius is None:
        return loss
    u = F.normalize(audio - text, dim=1)
    support = F.normalize(text + radius * u, dim=1)
    return loss + F.cross_entropy(SCALE * support @ audios.t(), label)


def ours(
    audio: Tensor, text: Tensor, more: sk.Negatives | None, radius: float | None, mib: int = 256
) -> Tensor:
    """`mib`: of workspace."""
    options: dict[str, Any] = {"bilateral": "none", "negatives": more, "workspace": mib * 2**20}
    loss: Tensor = sk.fused_svr_loss(audio, text, radius, SCALE, **options)
    return loss


def rows(n: int, D: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, D, generator=generator), dim=1)


def stepped(loss: Callable[..., Tensor], N: int, M: int, D: int, radius: float | None) -> Any:
    """Forward and backward of a loss with M negatives a side."""
    leaves = [rows(N, D, seed).requires_grad_() for seed in (1, 2)]
    more = sk.Negatives(rows(M, D, 3), rows(M, D, 4)) if M else None

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*leaves, more, radius), leaves)

    return step


def compared(first: Any, second: Any, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds, the median ratio of the first to the second, and peak memory."""
    steps = {"first": first, "second": second}
    times = timer.interleave({k: timer.wall_sampler(f) for k, f in steps.items()}, rounds)
    ratios = [a / b for a, b in zip(times["first"], times["second"], strict=True)]
    found = {f"{name}_ms": round(statistics.median(times[name]), 2) for name in steps}
    peaks = {name: peak_mib(step) for name, step in steps.items()}
    memory = {f"{name}_mib": round(value, 1) for name, value in peaks.items()}
    return {"time_ratio": round(statistics.median(ratios), 3), **found, **memory}


def peak_mib(step: Any) -> float:
    """What a step allocates through PyTorch, beyond the gradients it returns."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        gradients = step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return (peak - sum(x.nbytes for x in gradients)) / 2**20


def main() -> None:
    parser = arguments("bench.negatives", __doc__, 11)
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--m", type=int, default=7168)
    parser.add_argument("--d", type=int, default=512)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    N, M, D = chosen.n, chosen.m, chosen.d
    result: dict[str, Any] = {"N": N, "M": M, "D": D, "threads": chosen.threads}
    for name, radius in (("infonce", None), ("one-sided", 0.5)):
        case = (N, M, D, radius)
        for mib in (256, 64):
            way = partial(ours, mib=mib)
            found = compared(stepped(way, *case), stepped(eager, *case), chosen.rounds)
            result[f"ours over eager, {name}, {mib} MiB workspace"] = found
            print(name, mib, found, flush=True)
        with_queue, without = stepped(ours, N, N, D, radius), stepped(ours, N, 0, D, radius)
        found = compared(with_queue, without, chosen.rounds)
        result[f"a queue of N over none, {name}"] = found
        print("queue", name, found, flush=True)
    if chosen.out:
        write_json(chosen.out, {"machine": environment(), **result})


if __name__ == "__main__":
    main()
