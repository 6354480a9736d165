"""How time and memory are measured.

Time: the peers take turns in one process (round-robin, and every round starts with another peer),
so that whatever else the machine does hits all of them. Each is warmed up first; a sample is one
call, or as many as fill ten milliseconds; the median and the quartiles over the rounds are
reported. Absolute times depend on the machine's mood; quote ratios from one run.

Memory: the peak over one forward and backward beyond the inputs and the returned gradients, each
peer in a fresh process, measured twice:

- `peak`: resident memory. The process warms up at a small size, so that the libraries' code and
  buffers exist (a compiled peer also runs once at full size, which is when it compiles); returns
  free memory to the system; resets the high-water mark (writes 5 to /proc/self/clear_refs); runs
  once; reads VmHWM; subtracts the resident memory before and the gradients. glibc is told to map
  blocks of 64 KiB and more directly, so that freed memory is not resident. Where the mark cannot be
  reset, a thread samples the resident memory every millisecond (`method` says so). Good to a few
  MiB.
- `allocated`: the peak of what PyTorch's own allocator has handed out, from the profiler's record
  of every allocation. Repeats to the byte, but does not see the buffers of libraries.
"""

import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from supclap_kernels import testing

from . import gate
from .peers import Loss, Peer

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_SIZE = 256
MARKER = "memory: "

Step = Callable[[], tuple[Tensor, ...]]


def make_step(loss: Loss, inputs: testing.Inputs) -> Step:
    """One forward and backward; returns the gradients of audio, text, radius, scale (and bias)."""
    leaves = [value.detach().requires_grad_() for value in inputs.differentiable().values()]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*leaves), leaves)

    return step


@dataclass(frozen=True)
class Summary:
    """Seconds for one call."""

    median: float
    q1: float
    q3: float
    least: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> "Summary":
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, min(samples), len(samples))


def elapsed(step: Callable[[], object], calls: int = 1) -> float:
    """Seconds for one of `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int = 10, sample: float = 10e-3
) -> dict[str, Summary]:
    """Time the steps in turns, two rounds or more; one sample lasts `sample` seconds or more."""
    calls = {}
    for name, step in steps.items():
        warm_up = elapsed(step)
        if warm_up < 1.0:  # the first call of a fast step is far slower than the rest
            warm_up = elapsed(step, max(1, math.ceil(sample / warm_up)))
        calls[name] = max(1, math.ceil(sample / warm_up))
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(elapsed(steps[name], calls[name]))
    finally:
        if enabled:
            gc.enable()
    return {name: Summary.of(values) for name, values in samples.items()}


@dataclass(frozen=True)
class Memory:
    """Bytes beyond the inputs and the returned gradients."""

    peak: int
    allocated: int
    method: str


def peak_memory(peer: Peer, N: int, D: int, threads: int | None = None) -> Memory:
    """Measure one peer in a fresh process (see the module's docstring)."""
    request = {"peer": asdict(peer), "N": N, "D": D, "threads": threads or torch.get_num_threads()}
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", "bench.timing", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    if done.returncode or not lines:
        raise RuntimeError(
            f"measuring the memory of {peer.label} at N = {N}:\n{done.stderr[-4000:]}"
        )
    return Memory(**json.loads(lines[-1].removeprefix(MARKER)))


def resident(field: str = "VmRSS") -> int:
    """Bytes of resident memory now (VmRSS) or at most so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def trim() -> None:
    """Return free memory to the system."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        pass


def reset_high_water_mark() -> bool:
    """Whether VmHWM now counts from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return resident("VmHWM") <= resident() + 2**20


class Sampler:
    """Highest resident memory seen by a thread that looks every millisecond."""

    def __enter__(self) -> "Sampler":
        self.highest = resident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop.wait(1e-3):
            self.highest = max(self.highest, resident())

    def __exit__(self, *_: object) -> None:
        self.highest = max(self.highest, resident())
        self.stop.set()
        self.thread.join()


def peak_resident(step: Step) -> tuple[int, str]:
    """Peak resident memory of one step beyond what it returns, and how it was measured."""
    trim()
    before = resident()
    if reset_high_water_mark():
        gradients = step()
        highest, method = resident("VmHWM"), "VmHWM"
    else:
        with Sampler() as sampler:
            gradients = step()
        highest, method = sampler.highest, "sampled"
    return highest - before - returned(gradients), method


def peak_allocated(step: Step) -> int:
    """Peak of PyTorch's allocator during one step beyond what it returns."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        gradients = step()
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        live += record.nbytes()
        highest = max(highest, live)
    return highest - returned(gradients)


def returned(gradients: tuple[Tensor, ...]) -> int:
    return sum(gradient.numel() * gradient.element_size() for gradient in gradients)


def measure_memory(peer: Peer, N: int, D: int) -> Memory:
    """In this process, which must be fresh."""
    loss = peer.build()

    def step_at(size: int) -> Step:
        return make_step(loss, gate.make_inputs(peer, size, D))

    step_at(min(N, WARM_UP_SIZE))()
    step = step_at(N)
    if peer.kind == "compile":
        step()
    peak, method = peak_resident(step)
    return Memory(peak, peak_allocated(step), method)


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    measured = measure_memory(Peer(**request["peer"]), request["N"], request["D"])
    print(MARKER + json.dumps(asdict(measured)))
