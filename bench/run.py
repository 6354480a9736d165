"""Measure one part, on a machine that does nothing else.

    python -m bench.run [--only GROUP ...]      the CPU's table, about ten minutes on two cores:
                                                bench/results/NAME.csv, .bars.csv and .env.json
    python -m bench.run large|small             forward and backward of the matrix on a GPU
    python -m bench.run latency                 a step of a small batch, from Python and as a graph
    python -m bench.run sides                   the same of one launch, by the side of its tiles
    python -m bench.run kernels                 where the time of a step goes (kernels.py)

A GPU's results go to FOLDER/PART.csv (kernels.json) and FOLDER/env.json. The acceptance rule (at
N = 1024) judges ours before they are timed; a peer that fails is a row without numbers.
"""

import argparse
import csv
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import supclap_kernels as sk

from . import gate, kernels, machine, timer
from .cases import BAR_COLUMNS, GPU_PARTS, GROUPS, MODES, Case, Row, judged, label, report
from .inputs import leaves_of, make_inputs, make_large_inputs
from .peers import MIB, PEERS, Ours
from .timer import Step

CPU_COLUMNS = (
    "group", "N", "D", "peer", "objective", "bilateral", "dtype", "rounds", "median_ms", "q1_ms",
    "q3_ms", "least_ms", "peak_mib", "allocated_mib", "estimate_mib", "memory_method",
)  # fmt: skip
CASE_COLUMNS = ("mode", "N", "D", "dtype", "peer")
MATRIX_COLUMNS = (*CASE_COLUMNS, "forward_ms", "both_ms", "extra_mib", "rounds", "gate")
LATENCY_COLUMNS = (*CASE_COLUMNS, "python_us", "graph_us", "gate")

GATE_SIZE, WARM_UP, ROUNDS = 1024, 5, 11
BUDGET_MS = 12_000.0
"""A peer whose rounds would take longer than this gets fewer, 3 at least."""
LATENCY_STEPS = 20
"""Steps of a sample."""


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """A run that is cut off leaves the rows that it has measured."""

    def shown(value: object) -> object:
        if not isinstance(value, float):
            return value
        return f"{value:.5g}" if abs(value) < 1e5 else f"{value:.0f}"

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({column: shown(value) for column, value in row.items()})
            file.flush()


# ------------------------------------------------------------------------------------------- a CPU


def estimate_mib(peer: str, case: Case) -> float | None:
    """What `memory_estimate` says about ours."""
    ours = PEERS[peer]
    if not isinstance(ours, Ours):
        return None
    return sk.memory_estimate(case.N, case.D, case.torch_dtype, **ours.options(case.mode)) / MIB


def measure_group(group: str, rounds: int = 10, memory: bool = True) -> list[Row]:
    """Check every peer against the specification, time them in turns, measure their memory."""
    torch.compiler.reset()
    steps = {}
    for peer, case in GROUPS[group]:
        if PEERS[peer].state(case.mode) == "ok":
            loss = PEERS[peer].build(case.mode)
            gate.check(peer, loss, case)
            steps[peer, case] = Step(loss, leaves_of(make_inputs(case)))
    samplers = {entry: timer.wall_sampler(step.both) for entry, step in steps.items()}
    gc.collect()
    gc.disable()
    try:
        times_ms = timer.interleave(samplers, rounds)
    finally:
        gc.enable()
    del steps, samplers
    rows = []
    for (peer, case), samples_ms in times_ms.items():
        q1, median, q3 = statistics.quantiles(samples_ms, n=4, method="inclusive")
        row = {
            "group": group, "N": case.N, "D": case.D, "peer": label(peer, case),
            **MODES[case.mode].options, "dtype": case.dtype,
            "rounds": rounds, "median_ms": median, "q1_ms": q1, "q3_ms": q3,
            "least_ms": min(samples_ms), "estimate_mib": estimate_mib(peer, case),
            "peak_mib": None, "allocated_mib": None, "memory_method": "",
        }  # fmt: skip
        rows.append(row | timer.peak_memory(peer, case) if memory else row)
    return rows


def show(row: Row) -> str:
    time_ms = f"{row['median_ms']:10.2f} ms [{row['q1_ms']:.2f}, {row['q3_ms']:.2f}]"
    memory = f"{row['peak_mib']:10.1f} MiB (allocator {row['allocated_mib']:.1f})"
    return f"{row['group']:16s} {row['peer']:16s} N={row['N']:<6d} {time_ms:37s}{memory}"


def run_cpu(out: Path, groups: Iterable[str], rounds: int) -> None:
    environment = machine.environment()
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy (load average {os.getloadavg()[0]:.1f})", flush=True)
    start, rows = time.perf_counter(), []
    for group in groups:
        for row in measure_group(group, rounds):
            print(show(row), flush=True)
            rows.append(row)
    environment["seconds"] = round(time.perf_counter() - start)
    write_csv(out.with_name(out.name + ".csv"), CPU_COLUMNS, rows)
    write_csv(out.with_name(out.name + ".bars.csv"), BAR_COLUMNS, judged(rows))
    machine.write_json(out.with_name(out.name + ".env.json"), environment)
    print("\n".join(["", *report(rows)]))


# ------------------------------------------------------------------------------------------- a GPU

Prepare = Callable[[str, Step, Row], dict[str, timer.Sampler]]
"""Measures what needs no turns into the row, and returns what does, by column."""


def prepare_matrix(peer: str, step: Step, row: Row) -> dict[str, timer.Sampler]:
    row["extra_mib"] = timer.gpu_peak_mib(step)
    return {
        "forward_ms": lambda: timer.event_ms(step.forward),
        "both_ms": lambda: timer.event_ms(step.both),
    }


def prepare_latency(peer: str, step: Step, row: Row) -> dict[str, timer.Sampler]:
    """What a training loop waits for, and the replay of a CUDA graph."""
    wait = torch.cuda.synchronize
    samplers = {"python_us": lambda: 1e3 * timer.wall_ms(step.both, LATENCY_STEPS, wait)}
    if peer != "reduce-overhead":  # it replays a graph of its own when called
        replay = timer.replayed(step.both)
        samplers["graph_us"] = lambda: 1e3 * timer.event_ms(replay, LATENCY_STEPS)
    return samplers


def measure_case(case: Case, peers: Iterable[str], prepare: Prepare) -> list[Row]:
    """One interleaved run of the peers with these names."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
    leaves = leaves_of(make_large_inputs(case))
    rows: dict[str, Row] = {}
    samplers = {}
    for peer in peers:
        state = PEERS[peer].state(case.mode)
        if state != "ok":
            print(f"{peer}: {state}", flush=True)
            continue
        row = rows[peer] = {**vars(case), "peer": peer, "gate": "not applied"}
        try:
            loss = PEERS[peer].build(case.mode)
            if isinstance(PEERS[peer], Ours):
                violations = gate.violations(loss, replace(case, N=GATE_SIZE), "cuda")
                row["gate"] = "; ".join(violations) or "passed"
            step = Step(loss, leaves)
            for _ in range(WARM_UP):
                step.both()
            for column, sampler in prepare(peer, step, row).items():
                samplers[peer, column] = sampler
        except torch.OutOfMemoryError:
            row["gate"] += "; out of memory"
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            row["gate"] += f"; failed: {str(error)[:80]}"
        torch.cuda.empty_cache()
    for (peer, column), samples in timer.interleave(samplers, ROUNDS, BUDGET_MS).items():
        rows[peer] |= {column: statistics.median(samples), "rounds": len(samples)}
    print(*rows.values(), sep="\n", flush=True)
    return list(rows.values())


def until(seconds: float, cases: Iterable[Case]) -> Iterator[Case]:
    """Starts no case after these seconds."""
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start < seconds:
            yield case


def run_gpu(part: str, out: Path, cases: Iterable[Case], peers: Sequence[str]) -> None:
    environment = machine.environment()
    machine.write_json(out / "env.json", environment)
    if part == "kernels":
        results = [environment | kernels.ceilings()]
        for row in kernels.measure_cases(cases, peers):
            results.append(row)
            machine.write_json(out / "kernels.json", results)
        return
    columns, prepare = LATENCY_COLUMNS, prepare_latency
    if part in ("large", "small"):
        columns, prepare = MATRIX_COLUMNS, prepare_matrix
    rows = (row for case in cases for row in measure_case(case, peers, prepare))
    write_csv(out / f"{part}.csv", columns, rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("part", nargs="?", choices=("cpu", *GPU_PARTS), default="cpu")
    parser.add_argument(
        "--out", type=Path, help="cpu: results, without a suffix (default: by CPU); else a folder"
    )
    cpu = parser.add_argument_group("on a CPU")
    cpu.add_argument("--rounds", type=int, default=10, help="rounds of each interleaved run")
    cpu.add_argument("--threads", type=int, help="threads of PyTorch (default: PyTorch's)")
    cpu.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP",
        help=f"of {', '.join(GROUPS)}",
    )  # fmt: skip
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    gpu.add_argument(
        "--peers", nargs="+", choices=PEERS, metavar="PEER",
        help=f"of {', '.join(PEERS)} (default: by part)",
    )  # fmt: skip
    gpu.add_argument("--seconds", type=float, default=1e9, help="start no case after these")
    gpu.add_argument("--N", type=int, help="instead of the cases' own")
    gpu.add_argument("--D", type=int, help="instead of the cases' own")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    return options


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.part == "cpu":
        run_cpu(
            options.out or machine.RESULTS / machine.machine_name(), options.only, options.rounds
        )
        return
    part = GPU_PARTS[options.part]
    cases = [
        replace(case, N=options.N or case.N, D=options.D or case.D)
        for case in part.cases
        if case.mode in options.modes
    ]
    out = options.out or machine.RESULTS / "gpu"
    run_gpu(options.part, out, until(options.seconds, cases), options.peers or part.peers)


if __name__ == "__main__":
    main()
