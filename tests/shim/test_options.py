"""The kernels of csrc/cuda against the specification: every option, ragged sizes."""

import math
from collections.abc import Iterator

import pytest
import torch
from gpu_suite import (
    CLOSE,
    RANGES,
    SUPPORT_MODES,
    Guard,
    check_float16_range,
    check_literal_rows,
    further_suite,
    guarded,
    suite,
    verify,
)

from supclap_kernels.backends import tile_sizes
from supclap_kernels.backends.call import Tensors
from supclap_kernels.backends.cuda.sweeps import PANEL
from supclap_kernels.backends.state import POSITIVE, STATE_GEOMETRY
from supclap_kernels.options import Options

SUITE = suite("cuda", "panel")


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[Guard]:
    """Inputs inside NaN; the working memory, too, which is no single buffer (panel)."""
    guard = guarded(monkeypatch)
    monkeypatch.setattr(tile_sizes, "GPU_TILE", 128)  # several tile pairs
    yield guard
    assert guard.intact()


@pytest.mark.parametrize("n", range(len(SUITE)), ids=[str(row.id) for row in SUITE])
def test_options(n, guard, device):
    backend, case, _ = SUITE[n].values
    device.vary(n)
    way = device.way if backend == "cuda" else backend
    verify(case, guard, way, workspace=case.options["workspace"])


FURTHER = further_suite("cuda", "panel")


@pytest.mark.parametrize("n", range(len(FURTHER)), ids=[str(row.id) for row in FURTHER])
def test_further_negatives(n, guard, device):
    backend, case = FURTHER[n].values
    device.vary(n)
    way = {"cuda": "cuda:hopper" if case.dtype.itemsize == 2 else "cuda:panel"}.get(
        backend, backend
    )
    verify(case, guard, way, workspace=case.options["workspace"])


@pytest.mark.parametrize("mode", SUPPORT_MODES, ids=str)
@pytest.mark.parametrize("close", CLOSE.values(), ids=CLOSE.keys())
def test_some_literal_rows(mode, close, backend, guard, device):
    device.vary(len(close))
    check_literal_rows(mode, close, device.way if backend == "cuda" else backend)


@pytest.mark.parametrize("length, scale, upstream", RANGES)
def test_float16_weights_stay_in_range(length, scale, upstream, backend, guard):
    check_float16_range(length, scale, upstream, backend)


def test_loss_of_sums_literal_above_their_reference():
    """A sum 2^30 times what its m stands for, and a positive 2^-99 times: finite, and right."""
    unit = torch.eye(4, 8)
    options = Options(bilateral="none", reduction="none")
    inputs = Tensors(unit, unit, None, torch.tensor(1.0), None, None, None)
    call = PANEL.call(inputs, options)
    call.state[STATE_GEOMETRY + POSITIVE] = torch.tensor([-59.0, -61.0, -99.0, -120.0]) * math.log(
        2
    )
    call.running[0:4:2], call.running[1:4:2] = 0.0, 2.0**30
    rows, _ = call.finish_statistics()
    exact = 2 * (30 + torch.tensor([59.0, 61.0, 99.0, 120.0], dtype=torch.float64)) * math.log(2)
    assert float((rows / exact - 1).abs().max()) < 2e-7
