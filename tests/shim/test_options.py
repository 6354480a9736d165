"""The kernels of csrc/cuda against the specification: every option, ragged sizes."""

from collections.abc import Iterator

import pytest
from gpu_suite import (
    CLOSE,
    RANGES,
    SUPPORT_MODES,
    Guard,
    check_far_rows,
    check_float16_range,
    guarded,
    suite,
    verify,
)

from supclap_kernels.backends import gpu_single, tiles

SUITE = suite("cuda", "panel")


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[Guard]:
    """Inputs inside NaN; the working memory, too, which is no single buffer (panel)."""
    guard = guarded(monkeypatch)
    monkeypatch.setattr(tiles, "GPU_TILE", 128)  # several tile pairs
    yield guard
    assert guard.intact()


@pytest.mark.parametrize("n", range(len(SUITE)), ids=[str(row.id) for row in SUITE])
def test_options(n, guard, device):
    backend, case, _ = SUITE[n].values
    device.vary(n)
    if backend == "cuda":
        has_radius = case.radius != "none"
        options = gpu_single.Options(**case.options)
        assert gpu_single.limit_of(case.D, case.dtype, has_radius, options) >= case.N
    verify(case, guard, backend, workspace=case.options["workspace"])


@pytest.mark.parametrize("mode", SUPPORT_MODES, ids=str)
@pytest.mark.parametrize("close", CLOSE.values(), ids=CLOSE.keys())
def test_some_far_rows(mode, close, backend, guard, device):
    device.vary(len(close))
    check_far_rows(mode, close, backend)


@pytest.mark.parametrize("length, scale, upstream", RANGES)
def test_float16_weights_stay_in_range(length, scale, upstream, backend, guard):
    check_float16_range(length, scale, upstream, backend)
