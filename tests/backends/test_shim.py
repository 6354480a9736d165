"""The CUDA kernels on the host (tests/shim), in processes of their own."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from covering import ALL

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs x86-64 and g++"
)


def run(*arguments: str) -> str:
    command = [sys.executable, "tests/shim/run.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_every_option():
    passed = int(run().split()[-4])
    assert passed > (600 if ALL else 250)


SANITIZED = "literal or vectors or twice or one_pair or stats_are or rounds"
"""Every kernel and every phase; tests/shim/run.py --sanitize runs everything."""


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitized(sanitizer):
    passed = int(run("--sanitize", sanitizer, "--filter", SANITIZED).split()[-4])
    assert passed > (50 if ALL else 40)


def test_every_barrier_is_needed():
    assert int(run("--mutants").split()[-4]) > (40 if ALL else 20)
