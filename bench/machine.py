"""What the numbers depend on: the machine, its software, and the commit that was measured."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import supclap_kernels as sk
from supclap_kernels import native
from supclap_kernels.tables import cpu_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
MEASURED = ("supclap_kernels", "csrc", "build_tools", "setup.py", "bench/*.py")
"""What the numbers depend on in this repository."""


def first_line(*command: str) -> str:
    """The first line that a command prints; empty if it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return next(iter(done.stdout.splitlines()), "")


def cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def cpu_family() -> str:
    """As the processor numbers it: a cloud's AMD EPYC is 25 (Zen 3, Zen 4) or 26 (Zen 5)."""
    line = re.search(r"^cpu family\s*:\s*(\d+)$", cpu_info(), re.MULTILINE)
    return line[1] if line else "unknown"


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    return bool(set(cpu_info().split()) & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


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
    changed = first_line("git", "status", "--porcelain", "--", *MEASURED)
    return first_line("git", "rev-parse", "HEAD") + ("-dirty" if changed else "")


def environment() -> dict[str, Any]:
    """What the numbers depend on, without a name of the machine or a path."""
    module, reason = native.load()
    values = {
        "cpu": cpu_model(), "family": cpu_family(), "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": reason if module is None else module.isa(), "bfloat16_instructions": has_bfloat16(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
        "supclap_kernels": sk.__version__, "python": platform.python_version(),
        "compiler": first_line(os.environ.get("CXX", "c++"), "--version"),
        "system": f"{platform.system()} {platform.machine()}", "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average_before": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    if not torch.cuda.is_available():
        return values
    driver = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    gpu = {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}
    triton = first_line(sys.executable, "-c", "import triton; print(triton.__version__)")
    return {**gpu, "triton": triton, **values}


def arguments(module: str, documentation: str | None, rounds: int) -> argparse.ArgumentParser:
    """Returns a parser of what every measurement on a CPU takes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path)
    return parser


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
