"""`python -m bench.latency --out FOLDER`: one step of a small batch, into FOLDER/latency.csv.

What a training loop waits for: forward and backward called from Python, until the device is done
(python_us), and the same as the replay of a CUDA graph (graph_us). Peers in turns, median of at
least 10 rounds of STEPS steps. `bash bench/gpu.sh latency` runs it.
"""

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from supclap_kernels.backends import gpu_single

from . import peers
from .gpu import MODES, add_arguments, chosen, environment, fused, gate, leaves_of, literal

STEPS, ROUNDS, WARM_UP = 20, 11, 5
COLUMNS = ("mode", "N", "D", "dtype", "peer", "python_us", "graph_us", "gate")


def reduce_overhead(objective: str, bilateral: str, plain: bool) -> peers.Loss:
    return torch.compile(literal(False)(objective, bilateral, plain), mode="reduce-overhead")


def sided(side: int) -> Callable[..., peers.Loss]:
    """The one launch with tiles of this side."""

    def build(*mode: Any) -> peers.Loss:
        own = fused("cuda")(*mode)
        assert own is not None

        def loss(*given: Tensor) -> Tensor:
            gpu_single.SIDE = side
            try:
                return own(*given)
            finally:
                gpu_single.SIDE = 0

        return loss

    return build


PEERS: dict[str, Callable[..., peers.Loss]] = {
    "eager": literal(False),
    "compile": literal(True),
    "reduce-overhead": reduce_overhead,
    "panel": fused("panel"),
    "triton": fused("triton"),
    "cuda": fused("cuda"),
}
SIDES = {f"cuda-{side}": sided(side) for side in (16, 32, 64)}
"""For the table `kSides` of csrc/cuda/single/plan.cu; not among the peers unless named."""
LARGEST = 1024
"""The largest N of which tiles of every side fit on the chip."""
OURS = ("panel", "triton", "cuda", *SIDES)
OWN_GRAPH = ("reduce-overhead",)
"""Those that replay a graph of their own when called."""


def matrix() -> Iterator[tuple[str, int, int, torch.dtype]]:
    """(mode, N, D, dtype), the most important first."""
    yield "mirror", 24, 1024, torch.float32
    yield "mirror", 1024, 512, torch.bfloat16
    for N in (24, 64, 256, 1024, 2048):
        for dtype in (torch.bfloat16, torch.float32):
            for D in (512, 768, 1024):
                yield "mirror", N, D, dtype
    for mode in ("infonce", "one-sided", "siglip"):
        for N in (24, 256, 1024):
            yield mode, N, 512, torch.bfloat16


def called(step: Callable[[], Any]) -> float:
    """Microseconds a step, each until the device is done."""
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds a replay on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(STEPS):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / STEPS


def captured(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def measure(
    mode: str, N: int, D: int, dtype: torch.dtype, wanted: Sequence[str]
) -> list[dict[str, Any]]:
    """One interleaved run."""
    plain = MODES[mode][2]
    leaves = leaves_of(mode, N, D, dtype)
    used = [leaves[0], leaves[1], *(leaves[3:] if plain else leaves[2:])]
    rows, runs = [], {}
    torch.compiler.reset()
    for name in wanted:
        if name in SIDES and N > LARGEST:
            continue
        loss = (PEERS | SIDES)[name](*MODES[mode])
        row: dict[str, Any] = {"mode": mode, "N": N, "D": D, "dtype": str(dtype)[6:], "peer": name}
        rows.append(row)
        found = gate(loss, mode, D, dtype, True) if name in OURS else None
        row["gate"] = "not applied" if found is None else "; ".join(found) or "passed"

        def step(loss: peers.Loss = loss) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(loss(*leaves), used, allow_unused=True)

        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize()
        runs[name] = (step, None if name in OWN_GRAPH else captured(step), [], [])
    for turn in range(ROUNDS):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            step, graph, from_python, on_device = runs[name]
            from_python.append(called(step))
            if graph is not None:
                on_device.append(replayed(graph))
    for row in rows:
        _, _, from_python, on_device = runs[row["peer"]]
        row["python_us"] = round(statistics.median(from_python), 1)
        row["graph_us"] = round(statistics.median(on_device), 1) if on_device else ""
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    add_arguments(parser, MODES, [*PEERS, *SIDES])
    parser.set_defaults(peers=list(PEERS))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")
    with (given.out / "latency.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for case in chosen(matrix(), given):
            for row in measure(*case, given.peers):
                writer.writerow(row)
                print(row, flush=True)
            file.flush()  # a run that is cut off leaves what it has measured


if __name__ == "__main__":
    main()
