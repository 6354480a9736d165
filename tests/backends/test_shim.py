"""The CUDA kernels on the host (tests/shim), in processes of their own."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from covering import ALL

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs x86-64 and g++"
)


class Run(NamedTuple):
    """Arguments of tests/shim/run.py, and more than how many cases must pass."""

    arguments: tuple[str, ...]
    least: int


# Every kernel and every phase; tests/shim/run.py --sanitize runs everything.
SANITIZED = "literal or vectors or twice or one_pair or stats_are or rounds"
RUNS = {
    "every option": Run((), 600 if ALL else 100),
    "every barrier is needed": Run(("--mutants",), 40 if ALL else 8),
    "address sanitizer": Run(("--sanitize", "address", "--filter", SANITIZED), 50 if ALL else 12),
    "thread sanitizer": Run(("--sanitize", "thread", "--filter", SANITIZED), 50 if ALL else 12),
}


def run(*arguments: str) -> str:
    command = [sys.executable, "tests/shim/run.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def output(request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """What a run printed. All that were asked for run two at a time: each keeps one core busy."""
    items = [item for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(2) as pool:
        runs = {
            item.callspec.id: pool.submit(run, *RUNS[item.callspec.id].arguments) for item in items
        }
        yield lambda name: runs[name].result()


@pytest.mark.parametrize("name", RUNS)
def test_kernels_on_the_host(name, output):
    passed = int(output(name).split()[-4])
    assert passed > RUNS[name].least
