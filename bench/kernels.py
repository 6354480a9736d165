"""`python -m bench.kernels --out FOLDER`: where the time of a step goes, into FOLDER/kernels.json.

First the two ceilings of the card: a large product, and a copy (bytes read plus bytes written).
Then, for each mode and backend, a step's time (CUDA events, median), how long any kernel was
running, and every kernel with its launches and milliseconds for each step (PyTorch's profiler).
The library's products get their rate, and the epilogues of the panel engine their bandwidth.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from supclap_kernels.backends import tiles
from supclap_kernels.backends.panel import Layout, Tiling

from .gpu import (
    MODES,
    OURS,
    PEERS,
    WARM_UP,
    add_arguments,
    chosen,
    environment,
    leaves_of,
    timed,
)
from .peers import Loss

GRAMS = {"infonce": 0, "one-sided": 1, "mirror": 2, "siglip": 1, "siglip-plain": 0}
LIBRARY = ("nvjet", "gemm", "cutlass", "cublas", "xmma")
"""In the names of the library's products."""
STEPS, ROUNDS = 3, 10


def ceilings() -> dict[str, float]:
    """TFLOP/s of an 8192^3 product in bfloat16, and TB/s of a copy of 4 GiB."""
    X = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    product = median(lambda: torch.mm(X, X))
    copy = median(lambda: target.copy_(source))
    return {
        "product_tflops": round(2 * 8192**3 / product / 1e9, 1),
        "copy_tb_per_s": round(2 * source.nbytes / copy / 1e9, 2),
    }


def median(step: Callable[[], Any]) -> float:
    """Milliseconds."""
    for _ in range(WARM_UP):
        step()
    return statistics.median(timed(step) for _ in range(ROUNDS))


def running(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of intervals."""
    total = end = 0
    for first, last in sorted(spans):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def kernels_of(step: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds a step: of any kernel, and of each."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    spans, found = [], defaultdict(list)
    for event in profile.profiler.kineto_results.events():
        if event.device_type() != torch.autograd.DeviceType.CUDA:
            continue
        spans.append((event.start_ns(), event.end_ns()))
        found[event.name()].append(event.duration_ns())
    rows = [
        {"kernel": name[:90], "launches": len(spent) / STEPS, "ms": sum(spent) / STEPS / 1e6}
        for name, spent in found.items()
    ]
    rows.sort(key=lambda row: -row["ms"])
    return {"running_ms": running(spans) / STEPS / 1e6, "kernels": rows}


def rates(mode: str, peer: str, N: int, D: int, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the products and the epilogues of one of ours reach, each alone."""
    grams = GRAMS[mode]
    products = sum(r["ms"] for r in rows if any(word in r["kernel"] for word in LIBRARY))
    single = mode.startswith("siglip")
    logits, gradient = 1 + grams / 2, 2 + grams
    sweeps = 0 if peer.startswith("triton") or peer.endswith("hopper") else 2 - single
    if peer == "panel-32GiB":
        sweeps = min(sweeps, 1)
    found = {}
    if products:
        flop = 2 * N * N * D * (sweeps * logits + gradient)
        found["products_tflops"] = round(flop / products / 1e9, 1)
    tiling = Tiling(tiles.GPU_TILE, tiles.GPU_PAD, tiles.GPU_PAD, 1)
    elements = Layout.choose(N, grams, tiling, 2**60).panel_elements
    for kernel, size in (("panel_statistics", 4), ("panel_weights", 6)):
        spent = sum(r["ms"] for r in rows if kernel in r["kernel"])
        if spent and peer.startswith("panel"):
            found[f"{kernel}_tb_per_s"] = round(size * elements / spent / 1e9, 2)
    return found


def measure(loss: Loss, leaves: list[Tensor], mode: str, peer: str) -> dict[str, Any]:
    plain = MODES[mode][2]
    used = [leaves[0], leaves[1], *(leaves[3:] if plain else leaves[2:])]

    def step() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss(*leaves), used, allow_unused=True)

    N, D = leaves[0].shape
    row: dict[str, Any] = {"mode": mode, "N": N, "D": D, "peer": peer, "step_ms": median(step)}
    row |= kernels_of(step)
    if peer in OURS:
        row |= rates(mode, peer, N, D, row["kernels"])
    print({key: value for key, value in row.items() if key != "kernels"}, flush=True)
    for kernel in row["kernels"][:8]:
        print(f"    {kernel['ms']:9.3f} ms {kernel['launches']:6.0f} x {kernel['kernel']}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    add_arguments(parser, list(MODES)[:4], PEERS)
    parser.set_defaults(peers=OURS)
    parser.add_argument("--N", type=int, default=65_536)
    parser.add_argument("--D", type=int, default=768)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "kernels.json"
    found: list[dict[str, Any]] = [{**environment(), **ceilings()}]
    print(found[0], flush=True)
    for (mode,) in chosen(zip(given.modes), given):
        leaves = leaves_of(mode, given.N, given.D, torch.bfloat16)
        for peer in given.peers:
            loss = PEERS[peer](*MODES[mode])
            if loss is not None:
                found.append(measure(loss, leaves, mode, peer))
                file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
