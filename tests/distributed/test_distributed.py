"""The loss over process groups: gloo on the CPU, a process for each rank."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_cases as cases
import torch
from covering import ALL, core, covering
from gpu_suite import MODES, OPTIONS
from ranks import run

from supclap_kernels.testing import Case

TESTS = Path(__file__).resolve().parents[1]
FIELDS: dict[str, tuple[Any, ...]] = {
    "N": (4, 33, 70),
    "D": (3, 16, 48),
    "gap": (0.3, 0.02, 0.0),
    "weighted": (False, True),
    "duplicates": (False, True),
    "layout": ("contiguous", "transposed"),
}


def jobs(backends: tuple[str, ...], dtypes: tuple[torch.dtype, ...], least: int) -> list[cases.Job]:
    found = []
    for n, mode in enumerate(MODES):
        radius = (mode["radius"],) if "radius" in mode else ("scalar", "row")
        rows = covering(
            least, n, **OPTIONS, **FIELDS, radius=radius, dtype=dtypes, backend=backends,
            ranks=(1, 2, 3, 4), exchange=("gather", "ring"),
        )  # fmt: skip
        for row in rows:
            options = {name: row[name] for name in OPTIONS if name != "workspace"}
            options |= {k: v for k, v in mode.items() if k != "radius"}
            fields = {name: row[name] for name in (*FIELDS, "radius", "dtype")}
            if fields["dtype"] in (torch.float16, torch.bfloat16):  # of few numbers a lottery
                fields["gap"] = max(fields["gap"], 0.02)
                fields["N"], fields["D"] = max(fields["N"], 33), max(fields["D"], 16)
            if fields["D"] == 3:  # two directions of three numbers are much nearer than the gap
                fields["gap"] = 0.3
            if fields["N"] < 33 or row["backend"] == "reference":  # the floor does not know R / r
                fields["gap"] = max(fields["gap"], 0.02)
            more = {"exchange": row["exchange"], "workspace": row["workspace"]}
            found.append((row["ranks"], Case(**fields, options=options), row["backend"], more))
    return core(found)


def check(every: list[cases.Job], world: int = 4) -> None:
    failures = run(world, cases.suite, every)
    assert not failures[0], "\n".join(failures[0][:5])
    assert not any(failures)


def test_every_option():
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    every = jobs(("cpu",), dtypes, 40)
    assert len(every) >= (240 if ALL else 60)
    check(every)


def test_larger_batches():
    """Several tiles, operands that begin anywhere."""
    modes = [{}, {"bilateral": "none"}, {"objective": "siglip"}]
    check([
        (n, Case(N=1301, D=16, dtype=dtype, radius="row", options=mode), "cpu", {"workspace": size})
        for n in (2, 3, 4)
        for mode in modes
        for dtype in (torch.float32, torch.bfloat16)
        for size in (0, 2**28)
    ])  # fmt: skip


def test_further_negatives():
    """Every rank's are everybody's, whatever number each has."""
    rows = covering(
        **OPTIONS, radius=("none", "scalar", "row"), objective=("infonce", "siglip"),
        bilateral=("none", "mirror", "shared"), negatives=((7, 64), (129, 0), (0, 1)),
        dtype=(torch.float32, torch.float64, torch.bfloat16), duplicates=(False, True),
        weighted=(False, True), exchange=("gather", "ring"), backend=("cpu", "reference"),
    )  # fmt: skip
    fields = ("radius", "negatives", "dtype", "duplicates", "weighted")
    every = []
    for n, row in enumerate(rows):
        more = {name: row.pop(name) for name in ("exchange", "workspace")}
        backend, chosen = row.pop("backend"), {name: row.pop(name) for name in fields}
        if backend == "reference" and chosen["dtype"] == torch.bfloat16:  # rounded by every rank
            chosen["dtype"] = torch.float32
        case = Case(N=40, D=24, options=row, **chosen)
        every.append((1 + n % 4, case, backend, more))
    check(every)


def test_reference():
    """In plain PyTorch: the same, with second derivatives."""
    check(jobs(("reference",), (torch.float64, torch.float32), 12))


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_gpu_kernels_on_the_host(kernels):
    """The GPU backends' kernels, in processes that can run them on CPU tensors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if kernels == "triton":
        pytest.importorskip("triton")
        environment["TRITON_INTERPRET"] = "1"
    else:
        path = subprocess.run(
            [sys.executable, "shim/build.py"], cwd=TESTS, capture_output=True, text=True
        )
        if path.returncode:
            pytest.skip("needs x86-64 and g++")
        environment["SUPCLAP_SHIM"] = path.stdout.strip()
    code = f"import test_distributed as t; t.on_the_host({kernels!r})"
    command = [sys.executable, "-c", "if __name__ == '__main__':\n    " + code]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def on_the_host(kernels: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    every = jobs(("panel", kernels), dtypes, 12)
    check([(min(n, 3), case, *rest) for n, case, *rest in every if case.N < 70], world=3)


@pytest.mark.parametrize(
    "radius, options",
    [
        ("static", {}),
        ("static", {"objective": "siglip", "exchange": "ring"}),
        ("summary", {"bilateral": "none", "beta": 0.1}),
        ("similarities", {"bilateral": "shared", "exchange": "ring"}),
    ],
)
def test_data_parallel_training_is_training_in_one_process(radius, options):
    """DistributedDataParallel, uneven batches: every parameter's gradient."""
    for errors in run(4, cases.data_parallel, radius, options):
        assert max(errors) < 2e-5, errors


@pytest.mark.parametrize("duplicates", [True, False])
@pytest.mark.parametrize("options", [{}, {"objective": "siglip", "normalize": True}], ids=str)
def test_statistics(options, duplicates):
    case = Case(N=37, D=16, radius="row", duplicates=duplicates, weighted=True, options=options)
    for values in run(3, cases.statistics, case):
        for name, found, wanted in values:
            assert abs(found - wanted) <= 3e-6 * max(1.0, abs(wanted)), name


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_bytes_sent(world, exchange):
    """Of float32 rows; N D floats are what all ranks have together. A ring sends rows again for
    backward; gathered ones are kept."""
    N, D = 384, 512
    least, most = {"gather": (1, 1.9), "ring": (1.95, 3)}[exchange]
    for bilateral in ("none", "mirror"):
        options = {"bilateral": bilateral, "exchange": exchange}
        numbers = max(run(world, cases.sent, N, D, options)) / 4 / (N * D)
        assert least <= numbers <= most


def test_ranks_that_disagree_are_told():
    first, second = run(2, cases.disagree)
    for words, pair in zip(
        ("columns", "alpha", "objective", "radius", "same shape", "reduction"),
        zip(first, second, strict=True),
        strict=True,
    ):
        assert any(words in said for said in pair) and "no error" not in pair, pair
    assert first[4].startswith("RuntimeError: group: the call failed on rank 1")


def test_a_rank_that_dies_is_an_error():
    (said, seconds), nothing = run(2, cases.one_dies)
    assert nothing is None and said != "no error" and seconds < 60


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_backward_twice(exchange):
    assert all(run(3, cases.again, exchange))


def test_fully_sharded_towers():
    for errors in run(2, cases.fully_sharded):
        assert max(errors) < 2e-5, errors


def test_a_dtensor_is_told_what_to_pass():
    assert all("audio.to_local()" in said and "group=" in said for said in run(2, cases.dtensors))
