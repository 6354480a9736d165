"""Triton without a GPU: the interpreter's suite, in processes of its own, and what the compiler
makes of every kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from covering import core

ROOT = Path(__file__).resolve().parents[2]
SHARDS = ("panel", "not panel")


@pytest.fixture
def native_triton() -> None:
    """Triton's compiler; not in the interpreter's process."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled in the interpreter")


def test_interpreter_suite():
    """Both halves at once: each test keeps one core busy."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreter", "-k"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, shard], cwd=ROOT / "tests", env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for shard in SHARDS
    ]  # fmt: skip
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0, output[-4000:]
        assert " passed" in output and "skipped" not in output, output[-2000:]


SPECIALISED = """
from bench.aot import triton as aot
sizes = [set(aot.launches(90, "bfloat16", N)) for N in (200, 333, 1025)]
print(len(sizes[0]), [sorted({launch.name for launch in sizes[0] ^ other}) for other in sizes[1:]])
"""


def test_another_N_compiles_nothing_new(native_triton):
    """All that Triton specialises on is the same at every N (several tiles at each)."""
    command = [sys.executable, "-W", "ignore", "-c", SPECIALISED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    count, differences = done.stdout.split(maxsplit=1)
    assert int(count) > 60 and differences.strip() == "[[], []]", done.stdout


SCRIPT = """
import json, sys
from bench.aot import triton as aot
arch, only, kernel = int(sys.argv[1]), sys.argv[2], sys.argv[3]
print(json.dumps([aot.SHARED_LIMIT[arch], list(aot.report(arch, kernel, only=only))]))
"""
# Everything for Hopper; elsewhere bfloat16, and the tile kernels, whose blocks depend on it.
REPORTS = [*((a, *w) for a in (80, 100) for w in (("bfloat16", ""), ("32", "tile_"))), (90, "", "")]


@pytest.mark.parametrize(
    "arch, only, kernel", core(REPORTS, every=len(REPORTS)), ids=lambda x: f"sm_{x}" if x else x
)
def test_kernels_compile_well(arch, only, kernel, native_triton):
    from supclap_kernels.backends.tile_sizes import SPILLS

    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(arch), only, kernel]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    limit: int
    lines: list[dict[str, Any]]
    limit, lines = json.loads(done.stdout)
    assert len(lines) > (280 if not only else 45)
    instruction = {80: "hmma", 90: "hgmma", 100: "utchmma"}[arch]
    for line in lines:
        where = f"{line['name']} {line['config']}"
        listed = any(all(word in where.split() for word in key.split()) for key in SPILLS)
        assert line["loop_spills"] == 0, where
        assert line["spill_bytes"] <= (400 if listed else 0), f"{where}: {line['spill_bytes']}"
        assert line["shared_bytes"] <= limit, where
        seconds = line["compile_seconds"]
        assert seconds <= 20, f"{where}: {seconds} s"  # at most 10 where the cores are fast
        if line["name"].startswith("tile_") and "float32" not in line["config"]:
            assert line[instruction] > 0, where
