"""Each barrier of the kernels taken away in turn: at least one case must miss it, by a wrong
result, a deadlock, or (in a run under ThreadSanitizer, where these belong) a race."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from covering import core

from supclap_kernels import fused_svr_loss, native
from supclap_kernels.backends import tile_sizes
from supclap_kernels.testing import Case, baseline, evaluate, floors, make_inputs, truth, violations

ROOT = Path(__file__).parents[2]
BARRIER = re.compile(
    r"^\s*((__syncthreads|__syncwarp|warpgroup_barrier|grid_barrier)\(\)|mbarrier_wait\(.*\));"
)
SMALL = {"N": 40, "D": 24, "radius": "row", "gap": 0.05}
"""Three tiles a side on three multiprocessors; some rows are literal."""
SINGLE, PANEL, HOPPER = "cuda:single:16", "cuda:panel", "cuda:hopper"
CASES = [
    (SINGLE, Case(**SMALL, options={"normalize": True})),
    (SINGLE, Case(**SMALL, dtype=torch.float16, options={"bilateral": "shared"})),
    (SINGLE, Case(**SMALL, options={"objective": "siglip", "renormalize": False})),
    (PANEL, Case(**SMALL, options={"renormalize": False, "normalize": True})),
    (PANEL, Case(**SMALL, dtype=torch.bfloat16, options={"bilateral": "shared"})),
    (PANEL, Case(**{**SMALL, "N": 140}, options={"objective": "siglip"})),
    # Several slices and steps along D, and lists of literal rows in several chunks.
    (SINGLE, Case(**{**SMALL, "D": 136}, options={"bilateral": "none"})),
    (SINGLE, Case(**{**SMALL, "D": 136}, options={"objective": "siglip"})),
    (SINGLE, Case(**{**SMALL, "D": 264}, dtype=torch.bfloat16, options={"bilateral": "none"})),
    (PANEL, Case(**{**SMALL, "N": 300, "D": 8}, options={"bilateral": "none"})),
    # More operands than stages, several rounds, both sweeps in one.
    (HOPPER, Case(**{**SMALL, "N": 140, "D": 330}, dtype=torch.bfloat16)),
    (HOPPER, Case(**SMALL, dtype=torch.float16, options={"objective": "siglip"})),
    (HOPPER, Case(N=300, D=330, radius="none", dtype=torch.bfloat16)),
    # One step along D: a warp may be far ahead of the others of its team.
    (HOPPER, Case(N=300, D=24, radius="none", dtype=torch.bfloat16)),
]


def sites() -> list[str]:
    barriers = []
    for path in sorted(ROOT.glob("csrc/cuda/**/*.cuh")):
        file = path.relative_to(ROOT)
        for n, line in enumerate(path.read_text().splitlines(), 1):
            if BARRIER.match(line):
                barriers.append(f"{file}:{n}")
            # One a line, literally: what is not found here is not tested.
            elif re.search(r"__sync(threads|warp)", line) and not line.lstrip().startswith("//"):
                raise AssertionError(f"{file}:{n}: a barrier that stands not alone")
    return barriers


@pytest.fixture
def removed(device) -> Iterator[None]:
    device.set(3, 0, 16)
    yield
    native.cuda().remove_barrier("", "")


def empty_log() -> str:
    """The sanitizer's; the next report fills it again."""
    log = f"{os.environ.get('SHIM_LOG', '')}.{os.getpid()}"
    if os.path.exists(log):
        os.truncate(log, 0)
    return log


def is_missed(backend: str, case: Case, schedule: int) -> bool:
    native.cuda().set_schedule(schedule)
    inputs = make_inputs(case)
    try:
        result = evaluate(fused_svr_loss, inputs, **case.options, backend=backend, workspace=0)
    except RuntimeError as error:
        assert str(error).startswith("shim: "), error
        return True
    exact = truth(case, inputs)
    base = baseline(case, inputs, case.dtype != torch.float32)
    return bool(violations(result, exact, base, floors(case, inputs, exact)))


def missed_by(case: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether one of the CASES misses what is removed, in one of the schedules."""
    way, missing = CASES[case]
    with monkeypatch.context() as patch:
        patch.setattr(tile_sizes, "GPU_TILE", 128)
        if way == HOPPER:
            native.cuda().set_multiprocessors(1)  # which has all tiles
        schedules = range(native.cuda().SCHEDULES)
        return any(is_missed(way, missing, n) for n in schedules)


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.usefixtures("removed")
def test_nothing_is_missed_as_it_is(case, monkeypatch):
    native.cuda().remove_barrier("", empty_log())
    assert not missed_by(case, monkeypatch)


@pytest.mark.parametrize("site", core(sites()))
@pytest.mark.usefixtures("removed")
def test_barrier_is_missed(site, monkeypatch):
    native.cuda().remove_barrier(site, empty_log())
    room = site.split("/")[2]
    first = {"panel": PANEL, "hopper": HOPPER}.get(room, SINGLE)
    order = sorted(range(len(CASES)), key=lambda n: CASES[n][0] != first)
    assert any(missed_by(n, monkeypatch) for n in order), f"nobody misses the barrier at {site}"
