"""`python -m bench.run --out bench/results/NAME`: the whole table, into NAME.csv, NAME.bars.csv
and NAME.env.json.

Run it on a machine that does nothing else; it takes about ten minutes on two cores. `--only GROUP
...` measures a part.
"""

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

import supclap_kernels as sk
from supclap_kernels import native

from . import suite
from .timing import ROOT

MEASURED = ("supclap_kernels", "csrc", "build_tools", "setup.py", "bench/*.py")
"""What the numbers depend on."""


def output(*command: str) -> str:
    """First line that a command prints; empty if it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return next(iter(done.stdout.splitlines()), "")


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_name() -> str:
    """Such as cpu-amd-epyc-2core."""
    model = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*|\d+-core", " ", cpu_model().lower())
    return f"cpu-{'-'.join(re.findall(r'[a-z0-9]+', model))}-{cores()}core"


def commit() -> str:
    """The commit measured, with "-dirty" if what was measured differs from it."""
    changed = output("git", "status", "--porcelain", "--", *MEASURED)
    return output("git", "rev-parse", "HEAD") + ("-dirty" if changed else "")


def environment() -> dict[str, object]:
    """What the numbers depend on, without a name of the machine or a path."""
    module, reason = native.load()
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": reason if module is None else module.isa(),
        "bfloat16_instructions": suite.has_bfloat16(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "supclap_kernels": sk.__version__,
        "python": platform.python_version(),
        "compiler": output(os.environ.get("CXX", "c++"), "--version"),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def write_csv(path: Path, names: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {key: f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()}
            )


def write_results(out: Path, rows: Sequence[suite.Row], env: dict[str, object]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(suite.Row)]
    write_csv(out.with_name(out.name + ".csv"), names, [asdict(row) for row in rows])
    bars = [
        {
            "bar": bar.name,
            "measure": bar.measure,
            "value": value,
            "limit": bar.limit,
            "met": "yes" if value <= bar.limit else "no",
        }
        for bar in suite.bars()
        if (value := bar.value(rows)) is not None
    ]
    write_csv(
        out.with_name(out.name + ".bars.csv"), ["bar", "measure", "value", "limit", "met"], bars
    )
    out.with_name(out.name + ".env.json").write_text(json.dumps(env, indent=2) + "\n")


def show(row: suite.Row) -> str:
    memory = "" if row.peak_mib is None else f"{row.peak_mib:10.1f} MiB"
    if row.allocated_mib is not None:
        memory += f" (allocator {row.allocated_mib:.1f})"
    spread = f"[{row.q1_ms:.2f}, {row.q3_ms:.2f}]"
    time_ms = f"{row.median_ms:10.2f} ms {spread:22s}"
    return f"{row.group:16s} {row.peer:16s} N={row.N:<6d} {time_ms}{memory}"


def main() -> None:
    groups = suite.groups()
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    default = ROOT / "bench" / "results" / machine_name()
    parser.add_argument(
        "--out", type=Path, default=default, help="results, without a suffix (default: by CPU)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each interleaved run")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: PyTorch's)")
    parser.add_argument(
        "--only", nargs="+", choices=groups, metavar="GROUP", help=f"of {', '.join(groups)}"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    env = environment()
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy (load average {os.getloadavg()[0]:.1f})", flush=True)
    start, rows = time.perf_counter(), []
    for name in arguments.only or groups:
        for row in suite.measure(groups[name], arguments.rounds):
            print(show(row), flush=True)
            rows.append(row)
    env["seconds"] = round(time.perf_counter() - start)
    write_results(arguments.out, rows, env)
    print("\n".join(["", *suite.report(rows)]))


if __name__ == "__main__":
    main()
