"""Run the CUDA kernels of csrc/cuda on the host, against the specification.

    python tests/shim/run.py [--sanitize thread|address] [--filter NAME] [--mutants]

prints `N passed, N failed`; the exit status is 0 only if none failed. A sanitized run finds races
(thread) or accesses out of bounds and undefined behaviour (address). --mutants takes each barrier
of the kernels away in turn: every one must be missed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from build import ROOT, SHIM, build

# A sanitizer must be there before Python is.
LIBRARY = {"thread": "libtsan.so", "address": "libasan.so"}


def environment(sanitize: str, log: Path) -> dict[str, str]:
    found = {**os.environ, "SUPCLAP_SHIM": str(build(sanitize)), "OMP_NUM_THREADS": "1"}
    if sanitize:
        library = ["g++", f"-print-file-name={LIBRARY[sanitize]}"]
        found["LD_PRELOAD"] = subprocess.run(
            library, capture_output=True, text=True, check=True
        ).stdout.strip()
        found["SHIM_LOG"], found["SHIM_LIMIT"] = str(log), "300"
        shared = f"log_path={log}:exitcode=0"
        found["TSAN_OPTIONS"] = f"{shared}:report_signal_unsafe=0:suppress_equal_stacks=0"
        found["TSAN_OPTIONS"] += ":suppress_equal_addresses=0"
        found["ASAN_OPTIONS"] = f"{shared}:detect_leaks=0:detect_stack_use_after_return=0"
        found["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sanitize", choices=sorted(LIBRARY), default="")
    parser.add_argument("--filter", default="", help="a pytest -k expression")
    parser.add_argument("--mutants", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tests = (
            ["mutants.py"] if chosen.mutants else sorted(path.name for path in SHIM.glob("test_*"))
        )
        sanitize = "thread" if chosen.mutants else chosen.sanitize
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
        command += [str(SHIM / name) for name in tests]
        if chosen.filter:
            command += ["-k", chosen.filter]
        done = subprocess.run(
            command,
            cwd=ROOT / "tests",
            env=environment(sanitize, Path(folder) / "log"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    print(done.stdout[-6000:] if done.returncode else "", end="")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if done.returncode and not failed:
        failed = 1  # a case hung, or a sanitizer ended the process
    print(f"{counts.get('passed', 0)} passed, {failed} failed")
    return int(failed > 0 or done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
