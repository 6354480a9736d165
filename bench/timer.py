"""How time and memory are measured, on a CPU and on a GPU.

Time: whatever is compared takes turns in one process (round-robin, and every round starts with
another one), so that whatever else the machine does hits all of them. Each is warmed up first. On a
CPU a sample is one call, or as many as fill ten milliseconds; on a GPU one call between two events.
Absolute times depend on the machine's mood; quote ratios from one run.

Memory on a GPU: the allocator's peak beyond the inputs and the returned gradients. On a CPU the
peak over one forward and backward, each peer in a fresh process, measured twice:

- `peak_mib`: resident memory. The process warms up at a small size, so that the libraries' code and
  buffers exist (a compiled peer also runs once at full size, which is when it compiles); returns
  free memory to the system; resets the high-water mark (writes 5 to /proc/self/clear_refs); runs
  once; reads VmHWM; subtracts the resident memory before and the gradients. glibc is told to map
  blocks of 64 KiB and more directly, so that freed memory is not resident. Where the mark cannot be
  reset, a thread samples the resident memory every millisecond (`memory_method` says so). Good to a
  few MiB.
- `allocated_mib`: the peak of what PyTorch's own allocator has handed out, from the profiler's
  record of every allocation. Repeats to the byte, but does not see the buffers of libraries.
"""

import collections
import contextlib
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .cases import Case, Row
from .inputs import leaves_of, make_inputs
from .machine import ROOT
from .peers import MIB, PEERS, Loss

Key = TypeVar("Key")
Gradients = tuple[Tensor | None, ...]
Call = Callable[[], object]
Sampler = Callable[[], float]
"""Measures once."""


@dataclass
class Step:
    """A loss and what it is called with."""

    loss: Loss
    leaves: list[Tensor | None]

    def forward(self) -> Tensor:
        return self.loss(*self.leaves)

    def both(self) -> Gradients:
        """Forward and backward; a public kernel may leave out a gradient."""
        leaves = [x for x in self.leaves if x is not None]
        return torch.autograd.grad(self.forward(), leaves, allow_unused=True)


def gradient_bytes(gradients: Gradients) -> int:
    return sum(gradient.nbytes for gradient in gradients if gradient is not None)


# -------------------------------------------------------------------------------------------- time


def interleave(
    samplers: Mapping[Key, Sampler], rounds: int, budget: float = math.inf
) -> dict[Key, list[float]]:
    """Samples of each, taken in turns; who has spent the budget takes three at least."""
    samples: dict[Key, list[float]] = {name: [] for name in samplers}
    order = collections.deque(samplers)
    for turn in range(rounds):
        for name in order:
            if turn < 3 or sum(samples[name]) < budget:
                samples[name].append(samplers[name]())
        order.rotate(-1)
    return samples


def wall_ms(call: Call, calls: int = 1, wait: Call | None = None) -> float:
    """Milliseconds for one of `calls` calls, each with its `wait` for a device."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
        if wait is not None:
            wait()
    return 1e3 * (time.perf_counter() - start) / calls


def wall_sampler(call: Call, sample_ms: float = 10.0) -> Sampler:
    """After a warm-up: a sample lasts `sample_ms` or more."""
    warm_up_ms = wall_ms(call)
    if warm_up_ms < 1e3:  # the first call of a fast step is far slower than the rest
        warm_up_ms = wall_ms(call, max(1, math.ceil(sample_ms / warm_up_ms)))
    calls = max(1, math.ceil(sample_ms / warm_up_ms))
    return lambda: wall_ms(call, calls)


def event_ms(call: Call, calls: int = 1) -> float:
    """Milliseconds for one of `calls` calls, between two events of a GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def median_event_ms(call: Call) -> float:
    """Alone, after a warm-up."""
    for _ in range(3):
        call()
    return statistics.median(event_ms(call) for _ in range(10))


def replayed(call: Call) -> Call:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# ------------------------------------------------------------------------------------------ memory


def gpu_peak_mib(step: Step) -> float:
    """The allocator's peak beyond what there was before and the gradients."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = step.both()
    return (torch.cuda.max_memory_allocated() - before - gradient_bytes(gradients)) / MIB


WARM_UP_SIZE = 256
MARKER = "memory: "


def peak_memory(peer: str, case: Case) -> Row:
    """The columns of a peer's memory on a CPU, measured in a fresh process."""
    request = {"peer": peer, "case": asdict(case), "threads": torch.get_num_threads()}
    thresholds = {f"MALLOC_{name}_THRESHOLD_": "65536" for name in ("MMAP", "TRIM")}
    done = subprocess.run(
        [sys.executable, "-m", "bench.timer", json.dumps(request)],
        cwd=ROOT, env={**os.environ, **thresholds}, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    if done.returncode or not lines:
        raise RuntimeError(f"the memory of {peer} at N = {case.N}:\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix(MARKER))


def measure_memory(peer: str, case: Case) -> Row:
    """In this process, which must be fresh."""
    loss = PEERS[peer].build(case.mode)

    def step_at(N: int) -> Step:
        return Step(loss, leaves_of(make_inputs(replace(case, N=N))))

    step_at(min(case.N, WARM_UP_SIZE)).both()
    step = step_at(case.N)
    if peer == "compile":
        step.both()
    peak, method = peak_resident(step)
    allocated = peak_allocated(step)
    return {"peak_mib": peak / MIB, "allocated_mib": allocated / MIB, "memory_method": method}


def resident(field: str = "VmRSS") -> int:
    """Bytes of resident memory now (VmRSS) or at most so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def return_free_memory() -> None:
    """To the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def reset_high_water_mark() -> bool:
    """Whether VmHWM now counts from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return resident("VmHWM") <= resident() + MIB


def peak_resident(step: Step) -> tuple[int, str]:
    """Peak bytes of resident memory of one step beyond what it returns, and the method."""
    return_free_memory()
    before = resident()
    if reset_high_water_mark():
        gradients = step.both()
        highest, method = resident("VmHWM"), "VmHWM"
    else:
        gradients, highest = sampled_resident(step)
        method = "sampled"
    return highest - before - gradient_bytes(gradients), method


def sampled_resident(step: Step) -> tuple[Gradients, int]:
    """What a step returns, and the highest that a thread saw which looks every millisecond."""
    seen, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(1e-3):
            seen.append(resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    gradients = step.both()
    seen.append(resident())
    done.set()
    thread.join()
    return gradients, max(seen)


def peak_allocated(step: Step) -> int:
    """Peak bytes of PyTorch's allocator during one step beyond what it returns."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        gradients = step.both()
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        live += record.nbytes()
        highest = max(highest, live)
    return highest - gradient_bytes(gradients)


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    print(MARKER + json.dumps(measure_memory(request["peer"], Case(**request["case"]))))
