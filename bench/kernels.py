"""Where the time of a step on a GPU goes: `python -m bench.run kernels`, into kernels.json.

First the two ceilings of the card: a large product, and a copy (bytes read plus bytes written).
Then, for each mode and peer, a step's time (events, median), how long any kernel was running, and
every kernel with its launches and milliseconds for each step (PyTorch's profiler). The library's
products get their rate, and the epilogues of the panel engine their bandwidth.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from . import inside, timer
from .cases import MODES, Case, Row
from .inputs import leaves_of, make_large_inputs
from .peers import PEERS, Ours
from .timer import Call, Step

LIBRARY = ("nvjet", "gemm", "cutlass", "cublas", "xmma")
"""In the names of the library's products."""
PROFILED_STEPS = 3


def ceilings() -> Row:
    """TFLOP/s of an 8192^3 product in bfloat16, and TB/s of a copy of 4 GiB."""
    X = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    product_ms = timer.median_event_ms(lambda: torch.mm(X, X))
    copy_ms = timer.median_event_ms(lambda: target.copy_(source))
    return {
        "product_tflops": round(2 * 8192**3 / product_ms / 1e9, 1),
        "copy_tb_per_s": round(2 * source.nbytes / copy_ms / 1e9, 2),
    }


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of intervals."""
    total = end = 0
    for first, last in sorted(spans):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def kernels_of(call: Call) -> dict[str, Any]:
    """Milliseconds a step: of any kernel, and of each."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED_STEPS):
            call()
        torch.cuda.synchronize()
    spans, durations_ns = [], defaultdict(list)
    for event in profile.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            spans.append((event.start_ns(), event.end_ns()))
            durations_ns[event.name()].append(event.duration_ns())
    rows = [
        {
            "kernel": name[:90],
            "launches": len(spent) / PROFILED_STEPS,
            "ms": sum(spent) / PROFILED_STEPS / 1e6,
        }
        for name, spent in durations_ns.items()
    ]
    rows.sort(key=lambda row: -row["ms"])
    return {"running_ms": covered(spans) / PROFILED_STEPS / 1e6, "kernels": rows}


def rates(case: Case, peer: str, kernels: Sequence[Row]) -> dict[str, float]:
    """What the products and the epilogues of one of ours reach, each alone."""
    mode, N = MODES[case.mode], case.N

    def total_ms(*words: str) -> float:
        return sum(row["ms"] for row in kernels if any(word in row["kernel"] for word in words))

    logits, gradient = 1 + mode.grams / 2, 2 + mode.grams
    sweeps = 0  # that multiply logits out by the library
    if ":panel" in peer:
        sweeps = 1 if mode.objective == "siglip" or peer.endswith("-32GiB") else 2
    found = {}
    if spent_ms := total_ms(*LIBRARY):
        flop = 2 * N * N * case.D * (sweeps * logits + gradient)
        found["products_tflops"] = round(flop / spent_ms / 1e9, 1)
    for kernel, element_bytes in (("panel_statistics", 4), ("panel_weights", 6)):
        if spent_ms := total_ms(kernel):
            bytes_moved = element_bytes * inside.panel_elements(N, mode.grams)
            found[f"{kernel}_tb_per_s"] = round(bytes_moved / spent_ms / 1e9, 2)
    return found


def measure(case: Case, peer: str, step: Step) -> Row:
    row: Row = {"mode": case.mode, "N": case.N, "D": case.D, "peer": peer}
    row |= {"step_ms": timer.median_event_ms(step.both), **kernels_of(step.both)}
    if isinstance(PEERS[peer], Ours):
        row |= rates(case, peer, row["kernels"])
    print({key: value for key, value in row.items() if key != "kernels"}, flush=True)
    for kernel in row["kernels"][:8]:
        print(f"    {kernel['ms']:9.3f} ms {kernel['launches']:6.0f} x {kernel['kernel']}")
    return row


def measure_cases(cases: Iterable[Case], peers: Sequence[str]) -> Iterator[Row]:
    """Of every peer that can run here."""
    for case in cases:
        leaves = leaves_of(make_large_inputs(case))
        for peer in peers:
            state = PEERS[peer].state(case.mode)
            if state == "ok":
                yield measure(case, peer, Step(PEERS[peer].build(case.mode), leaves))
            else:
                print(f"{peer}: {state}", flush=True)
