"""What backend="auto" takes, by the size of the batch.

measured    by `tune` on this device, or on an H200 by bench/: what was fastest
by model    estimate.py: our kernels where it gives them a margin over eager PyTorch, or where
            eager PyTorch would not fit into the memory; else eager PyTorch
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import native, tables
from .backends import available
from .backends.call import Route
from .backends.cuda import route as cuda_route
from .backends.estimate import MARGIN, SHARE, Kind, eager_bytes, seconds
from .backends.machine import OLDEST, Machine, device_index, machine_at
from .backends.tile_sizes import CPU_SMALL
from .options import PLAIN
from .tables import Measured

SIZES = tuple(round(2 ** (n / 4)) for n in range(12, 81))
"""Batches for which the model is asked; one between two of them is treated as the larger one."""

MEASURED = "measured fastest on an H200"
BY_MODEL = f"by model at least {MARGIN} times faster than eager PyTorch"
BY_MEMORY = f"eager PyTorch would take more than {SHARE:.0%} of the free memory"
EAGER = f"by model no kernel is {MARGIN} times faster than eager PyTorch"
MODELLED = (BY_MODEL, BY_MEMORY, EAGER)
ONLY = "by model the fastest kernel"


CPU_WAYS = (
    Route("cpu:small", CPU_SMALL, "one native call, since the batch is small"),
    Route("cpu:panel", None, "panels with C++ epilogues; measured faster than eager"),
)


def family(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that has a way for such tensors, and why; `routes` says by what size."""
    if device.type == "cpu":
        reason = available.state("cpu")
        if reason != "ok":
            return "reference", f"fallback: {reason}"
        return "cpu", "panels with C++ epilogues"
    if device.type != "cuda" or torch.version.hip is not None:
        return "reference", f"fallback: no kernel for {device.type} tensors here"
    if dtype == torch.float64:
        return "reference", "float64: the kernels compute in float32"
    if not native.has_device():
        return "reference", "fallback: no CUDA device"
    index = device_index(device)
    found = next((x for x in ("cuda", "triton") if available.state(x, index) == "ok"), None)
    if found is None:
        return "reference", "fallback: no kernel for cuda tensors here"
    if available.capability(index) < OLDEST:
        return "reference", too_old(available.capability(index))
    return found, "by the size of the batch"


def routes(
    device: torch.device, kind: Kind, staged: bool, machine: Machine | None = None
) -> tuple[Route, ...]:
    """The ways by the size of the batch, smallest first; eager PyTorch may be one of them.

    `staged`: the pass is called stage by stage (distributed.py): not in one launch or call, and all
    ranks choose alike, whatever memory they have left and was measured on their machines.
    `machine`: one that is only described.
    """
    name, reason = family(device, kind.dtype) if machine is None else ("", "")
    if kind.dtype == torch.float64 and name != "cpu":
        name, reason = "reference", "float64: the kernels compute in float32"
    if name == "reference":
        return (Route(name, None, reason),)
    table = None if staged or machine is not None else tables.load(device)
    measured = None if table is None else table.of(kind)
    if name == "cpu":
        if measured is None:
            return CPU_WAYS[staged:]
        return by_size(lambda N: cpu_pick(N, measured), CPU_SMALL)
    machine = machine or machine_at(device_index(device))
    return gpu_routes(machine, kind, staged, measured, only_kernels=staged)


def cpu_pick(N: int, measured: Measured) -> Route:
    able = [x for x in CPU_WAYS if x.largest is None or N <= x.largest]
    return measured.fastest(N, tuple(x.way for x in able), True) or able[0]


class Candidates(NamedTuple):
    """The ways that can run on a machine."""

    single: int
    """the largest batch of one launch; 0: there is none"""
    large: tuple[str, ...]
    """ways for batches of any size"""

    def at(self, N: int) -> tuple[str, ...]:
        return ("cuda:single", *self.large) if N <= self.single else self.large


def candidates(machine: Machine, kind: Kind, staged: bool) -> Candidates:
    large = ["cuda:panel"] if machine.cuda else []
    if machine.hopper and kind.dtype.itemsize == 2 and kind.mode != PLAIN:
        large.append("cuda:hopper")
    if machine.triton and not machine.cuda:
        large += ["triton:panel", "triton:tile"]
    if machine.triton and machine.hopper:
        large.append("triton:tile")
    single = cuda_route.single_limit(machine, kind) if machine.cuda and not staged else 0
    return Candidates(single, tuple(large))


def runnable(machine: Machine, kind: Kind, N: int, staged: bool = False) -> tuple[str, ...]:
    """Every way that can run, whether the model knows what it takes or not."""
    ways = ["triton:panel", "triton:tile"] if machine.triton else []
    if machine.cuda:
        ways.append("cuda:panel")
    if machine.cuda and not staged and N <= cuda_route.single_limit(machine, kind):
        ways.append("cuda:single")
    if machine.hopper and kind.dtype.itemsize == 2:
        ways.append("cuda:hopper")
    return tuple(ways)


def on_hopper(N: int, kind: Kind, able: Candidates) -> Route | None:
    """What was measured on an H200, with the kernels for Hopper."""
    if N <= able.single:
        return Route("cuda:single", None, f"one launch; {MEASURED} for small batches")
    if "cuda:hopper" in able.large:
        reason = "for large batches with support vectors in 16 bits"
        return Route("cuda:hopper", None, f"{MEASURED} {reason}")
    if kind.mode == PLAIN and kind.infonce and kind.dtype.itemsize == 2:
        if "triton:tile" in able.large:
            reason = "for large batches of the plain InfoNCE in 16 bits"
            return Route("triton:tile", None, f"{MEASURED} {reason}")
    return None


def kernels(device: torch.device, kind: Kind) -> tuple[Route, ...]:
    """The ways of operators, which cannot be eager PyTorch. Compiled programs contain them, so they
    depend on the device and on what is installed alone: not on what was measured, on free memory,
    or on PyTorch's settings."""
    name, reason = family(device, kind.dtype)
    if name == "cpu":
        return CPU_WAYS
    if name == "reference":
        return (Route(name, None, reason),)
    machine = machine_at(device_index(device))._replace(tf32=False)
    return gpu_routes(machine, kind, False, None, only_kernels=True)


def eager_fits(machine: Machine, kind: Kind, N: int) -> bool:
    return eager_bytes(N, kind.directions) <= SHARE * machine.free


def by_model(
    machine: Machine, N: int, kind: Kind, ways: tuple[str, ...], only_kernels: bool
) -> Route:
    only_measured = ("cuda:hopper", "triton:tile") if machine.cuda else ()
    times = {way: seconds(machine, way, N, kind) for way in ways if way not in only_measured}
    best = min(times, key=times.__getitem__)
    if only_kernels:
        return Route(best, None, ONLY)
    if MARGIN * times[best] <= seconds(machine, "reference", N, kind):
        return Route(best, None, BY_MODEL)
    if eager_fits(machine, kind, N):
        return Route("reference", None, EAGER)
    return Route(best, None, BY_MEMORY)


def gpu_routes(
    machine: Machine, kind: Kind, staged: bool, measured: Measured | None, only_kernels: bool
) -> tuple[Route, ...]:
    if machine.capability < OLDEST:
        return (Route("reference", None, too_old(machine.capability)),)
    able = candidates(machine, kind, staged)
    if not able.large:
        reason = "neither the CUDA kernels nor Triton's are installed"
        return (Route("reference", None, f"fallback: {reason}"),)

    def pick(N: int) -> Route:
        ways, found = able.at(N), None
        if measured is not None:
            every = runnable(machine, kind, N, staged)
            found = measured.fastest(N, every, eager_fits(machine, kind, N))
        if found is None and machine.hopper:
            found = on_hopper(N, kind, able)
        return found or by_model(machine, N, kind, ways, only_kernels)

    return by_size(pick, able.single)


def by_size(pick: Callable[[int], Route], *borders: int) -> tuple[Route, ...]:
    """The ways that `pick` names for each of SIZES and for the borders, equal ones joined."""
    routes: list[Route] = []
    for N in sorted({*SIZES, *borders} - {0}):
        found = pick(N)._replace(largest=N)
        if routes and routes[-1]._replace(largest=N) == found:
            routes.pop()
        routes.append(found)
    return *routes[:-1], routes[-1]._replace(largest=None)


def treated_as(N: int, ways: tuple[Route, ...]) -> int:
    """The batch that was asked about for one of N pairs."""
    borders = {way.largest for way in ways if way.largest is not None}
    return min((size for size in {*SIZES, *borders} if size >= N), default=N)


def too_old(capability: tuple[int, int]) -> str:
    return "the kernels need compute capability {}.{}, this is {}.{}".format(*OLDEST, *capability)


def readable(bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if bytes < 1024:
            return f"{bytes:.3g} {unit}"
        bytes /= 1024
    return f"{bytes:.3g} GiB"


def numbers(machine: Machine, kind: Kind, N: int, way: str) -> str:
    """What the model says of one batch."""
    ours = ""
    if way not in ("reference", "cuda:hopper"):
        ours = f"{1e3 * seconds(machine, way, N, kind):.3g} ms, "
    eager = 1e3 * seconds(machine, "reference", N, kind)
    needed, free = readable(eager_bytes(N, kind.directions)), readable(machine.free)
    return (
        f"model of {machine.card.name}: {ours}eager PyTorch {eager:.3g} ms and {needed} "
        f"of {free} that are free"
    )
