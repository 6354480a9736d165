"""`tune`: measures the ways of this machine, so that backend="auto" takes the fastest of them."""

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import direct, dispatch, native, tables
from .automatic import eager_fits, runnable
from .backends import available
from .backends.call import Tensors
from .backends.estimate import Kind
from .backends.machine import OLDEST, Machine, device_index, machine_at
from .backends.tile_sizes import CPU_SMALL
from .loss import fused_svr_loss
from .options import MIRROR, ONE_SIDED, PLAIN
from .selfcheck import trusted
from .testing import Case, make_inputs

BUDGET = 100.0
"""Seconds, of which every kind of call gets an equal part."""
ROUNDS, MOST_ROUNDS, SETTLED = 5, 101, 0.3
"""A batch is measured in so many rounds, and in more until so many seconds have gone by."""
D = 512
KINDS = [
    (torch.float32, MIRROR, True),
    (torch.bfloat16, MIRROR, True),
    (torch.float32, ONE_SIDED, True),
    (torch.bfloat16, ONE_SIDED, True),
    (torch.float32, PLAIN, True),
    (torch.bfloat16, PLAIN, True),
    (torch.float32, ONE_SIDED, False),
    (torch.bfloat16, ONE_SIDED, False),
    (torch.float32, PLAIN, False),
    (torch.bfloat16, PLAIN, False),
]
SIZES = {"cpu": (24, 64, 256, 1024, 2048), "cuda": (24, 128, 512, 1024, 2048, 4096, 8192, 16384)}


def ways_at(device: torch.device, kind: Kind, N: int) -> list[str]:
    """The ways to measure, eager PyTorch among them where it fits into the memory."""
    ways = cpu_ways(N) if device.type == "cpu" else gpu_ways(machine_at(device.index), kind, N)
    return [
        way for way in ways
        if way == "reference" or trusted(way, dispatch.implementation(way), device, kind)
    ]  # fmt: skip


def cpu_ways(N: int) -> list[str]:
    if available.state("cpu") != "ok":
        return ["reference"]
    return ["reference", "cpu:panel", *(["cpu:small"] if N <= CPU_SMALL else [])]


def gpu_ways(machine: Machine, kind: Kind, N: int) -> list[str]:
    eager = ["reference"] if eager_fits(machine, kind, N) else []
    return [*eager, *runnable(machine, kind, N)]


def step_of(device: torch.device, kind: Kind, N: int, way: str) -> Callable[[], None]:
    """Forward and backward of one batch, finished when it returns."""
    options: dict[str, Any] = {
        "objective": "infonce" if kind.infonce else "siglip",
        "bilateral": "mirror" if kind.mode == MIRROR else "none",
    }
    radius = "none" if kind.mode == PLAIN else "scalar"
    case = Case(N=N, D=kind.D, dtype=kind.dtype, radius=radius, options=options)
    given = make_inputs(case, str(device))
    leaves = Tensors(
        given.audio, given.text, given.radius, given.logit_scale, given.logit_bias, None, None
    )
    for x in leaves[:5]:
        if x is not None:
            x.requires_grad_()
    needed = [x for x in leaves if x is not None]

    def step() -> None:
        loss = fused_svr_loss(*leaves[:5], backend=way, **options)
        torch.autograd.grad(loss, needed)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def milliseconds(steps: dict[str, Callable[[], None]], until: float) -> dict[str, float]:
    """Medians of interleaved rounds. A way that is ten times as slow as another one is not called
    again."""
    every: dict[str, list[float]] = {}
    for way, step in steps.items():
        step()  # compiles, allocates
        every[way] = [min(seconds_of(step), seconds_of(step))]
    fastest = min(every.values())[0]
    running = [way for way in steps if every[way][0] <= 10 * fastest]
    start, rounds = time.perf_counter(), 1
    while time.perf_counter() < until and rounds < MOST_ROUNDS:
        if rounds >= ROUNDS and time.perf_counter() - start > SETTLED:
            break
        rounds += 1
        for way in running:
            every[way].append(seconds_of(steps[way]))
    return {way: 1e3 * statistics.median(values) for way, values in every.items()}


def seconds_of(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@torch.inference_mode(False)
def tune(
    device: str | torch.device | None = None,
    *,
    budget: float = BUDGET,
    report: Callable[[str], Any] = print,
) -> Path:
    """Measure the ways of this machine, and let backend="auto" take the fastest from now on.

    Forward and backward at D = 512, for InfoNCE and SigLIP with and without support vectors, in
    float32 and bfloat16. Run it on a quiet machine; a CPU's table holds for the number of threads
    that it was made with.

    Args:
        device: "cpu", "cuda", "cuda:1"; default the current CUDA device, or the CPU without one.
        budget: seconds that it may take, about. What does not fit is left to what `explain` says.
        report: called with a line for every batch that was measured.

    Returns:
        The table's file, in the folder SUPCLAP_CACHE, or the user's cache. It is used until torch,
        Triton, CUDA or this package change.

    Raises:
        ValueError: a device that has no ways, or no positive budget. RuntimeError: it is not here,
            or the budget was too small to measure anything. OSError: the folder is not writable.
    """
    where = tuned_device(device)
    if not budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {budget}")
    tables.place_for(where)  # what is in the way says so now
    start = time.perf_counter()
    kinds: dict[str, dict[int, dict[str, float]]] = {}
    with torch.inference_mode(False), torch.enable_grad():
        for n, (dtype, mode, infonce) in enumerate(KINDS):
            kind = Kind(D, dtype, mode, infonce)
            until = start + budget * (n + 1) / len(KINDS)
            rows = dict(measured(where, kind, until, report))
            if rows:
                kinds[tables.name_of(kind)] = rows
    if not kinds:
        raise RuntimeError(f"tune: nothing could be measured in {budget} seconds")
    for name, rows in list(kinds.items()):  # on a CPU float16 is widened to float32
        like = "float32" if where.type == "cpu" else "bfloat16"
        if name.startswith(like):
            kinds["float16" + name.removeprefix(like)] = rows
    path = tables.save(where, kinds)
    direct.forget()
    return path


def tuned_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if native.has_device() else "cpu"
    where = torch.device(device)
    if where.type == "cuda":
        if not native.has_device():
            raise RuntimeError("tune: there is no CUDA device")
        where = torch.device("cuda", device_index(where))
        if available.capability(where.index) < OLDEST:
            raise RuntimeError("tune: the kernels do not run on this GPU")
    elif where.type != "cpu":
        raise ValueError(f"tune measures CPUs and CUDA GPUs, got {device}")
    return where


def measured(
    device: torch.device, kind: Kind, until: float, report: Callable[[str], Any]
) -> Iterable[tuple[int, dict[str, float]]]:
    """The sizes of one kind of call, with their milliseconds, as far as the time allows."""
    for N in SIZES[device.type]:
        if time.perf_counter() > until:
            return
        ways = ways_at(device, kind, N)
        if not ways:
            return
        times = milliseconds({way: step_of(device, kind, N, way) for way in ways}, until)
        report(f"{tables.name_of(kind)}, N = {N}: {tables.listed(times)}")
        yield N, times
