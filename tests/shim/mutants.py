"""Each barrier of the kernels taken away in turn: at least one case must miss it, by a wrong
result, a deadlock, or (in a run under ThreadSanitizer, where these belong) a race."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from supclap_kernels import fused_svr_loss, native
from supclap_kernels.testing import Case, baseline, evaluate, floors, make_inputs, truth, violations

KERNELS = Path(__file__).parents[2] / "csrc" / "cuda"
RECORD = Path(__file__).parent / "mutants.json"
"""The kernels as they were when all mutants were found: `run.py --mutants` writes it."""
BARRIER = re.compile(r"^\s*(__syncthreads|__syncwarp|grid_barrier)\(\);", re.MULTILINE)
SMALL = {"N": 40, "D": 24, "radius": "row", "gap": 0.05}
"""Three tiles a side on three multiprocessors; some rows are far."""
CASES = [
    ("cuda", Case(**SMALL, options={"normalize": True})),
    ("cuda", Case(**SMALL, dtype=torch.float16, options={"bilateral": "shared"})),
    ("cuda", Case(**SMALL, options={"objective": "siglip", "renormalize": True})),
    ("panel", Case(**SMALL, options={"renormalize": True, "normalize": True})),
    ("panel", Case(**SMALL, dtype=torch.bfloat16, options={"bilateral": "shared"})),
    ("panel", Case(**{**SMALL, "N": 140}, options={"objective": "siglip"})),
    # Several steps along D, and lists of far rows in several chunks.
    ("cuda", Case(**{**SMALL, "D": 136}, options={"bilateral": "none"})),
    ("cuda", Case(**{**SMALL, "D": 264}, dtype=torch.bfloat16, options={"bilateral": "none"})),
    ("panel", Case(**{**SMALL, "N": 300, "D": 8}, options={"bilateral": "none"})),
]


def digests() -> dict[str, str]:
    """Of every file of kernels."""
    files = sorted(KERNELS.glob("*.cuh"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}


def sites() -> list[str]:
    """Of all kernels; with SHIM_CHANGED=1 of those that changed since all were last tried."""
    found = []
    known = json.loads(RECORD.read_text()) if os.environ.get("SHIM_CHANGED") == "1" else {}
    for name, digest in digests().items():
        path = KERNELS / name
        if known.get(name) == digest:
            continue
        for n, line in enumerate(path.read_text().splitlines(), 1):
            if BARRIER.match(line):
                found.append(f"{path.name}:{n}")
            # One a line, literally: what is not found here is not tested.
            elif re.search(r"__sync(threads|warp)", line) and not line.lstrip().startswith("//"):
                raise AssertionError(f"{path.name}:{n}: a barrier that stands not alone")
    return found


@pytest.fixture
def removed(device) -> Iterator[None]:
    device.set(3, 0, 16)
    yield
    native.cuda().remove_barrier("")


def reports() -> int:
    log = Path(f"{os.environ.get('SHIM_LOG', '')}.{os.getpid()}")
    return log.stat().st_size if log.exists() else 0


def is_missed(backend: str, case: Case, schedule: int) -> bool:
    native.cuda().set_schedule(schedule)
    inputs, before = make_inputs(case), reports()
    try:
        result = evaluate(fused_svr_loss, inputs, **case.options, backend=backend, workspace=0)
    except RuntimeError as error:
        assert "deadlock" in str(error), error
        return True
    if reports() > before:
        return True
    exact = truth(case, inputs)
    base = baseline(case, inputs, case.dtype != torch.float32)
    return bool(violations(result, exact, base, floors(case, inputs, exact)))


def test_the_record_is_of_kernels_that_exist():
    assert set(json.loads(RECORD.read_text())) <= set(digests())


@pytest.mark.parametrize("site", sites())
@pytest.mark.usefixtures("removed")
def test_barrier_is_missed(site, monkeypatch):
    monkeypatch.setattr("supclap_kernels.backends.tiles.GPU_TILE", 128)
    native.cuda().remove_barrier(site)
    first = "panel" if site.startswith("panel") else "cuda"
    for backend, case in sorted(CASES, key=lambda pair: pair[0] != first):
        for schedule in range(native.cuda().SCHEDULES):
            if is_missed(backend, case, schedule):
                return
    pytest.fail(f"nobody misses the barrier at {site}")
