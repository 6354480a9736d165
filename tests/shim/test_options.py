"""The kernels of csrc/cuda against the specification: every option, ragged sizes."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gpu_suite import MODES, Guard, accepted, suite, verify

from supclap_kernels.backends import gpu_call, gpu_single, tiles
from supclap_kernels.testing import Case, make_inputs

SUITE = suite("cuda", "panel")


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[Guard]:
    """Inputs inside NaN; the working memory, too, which is no single buffer (panel)."""
    guard = Guard()
    empty = lambda self, *shape, dtype=torch.float32: guard.empty(shape, dtype)  # noqa: E731
    monkeypatch.setattr(gpu_call.Call, "new_empty", empty)
    zeros = lambda self, *shape: guard.empty(shape).zero_()  # noqa: E731
    monkeypatch.setattr(gpu_call.Call, "new_zeros", zeros)
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


@pytest.mark.parametrize("mode", MODES[1:4] + MODES[5:], ids=str)
@pytest.mark.parametrize("close", [[5], list(range(0, 120, 6))], ids=("one", "twenty"))
def test_some_far_rows(mode, close, backend, guard, device):
    device.vary(len(close))
    options = {**mode, "renormalize": len(close) == 1}
    case = Case(N=129, D=20, options=options)
    inputs = make_inputs(case)
    inputs.audio[close] = inputs.text[close] + 0.02 * inputs.audio[close].flip(1)
    accepted(case, inputs, backend)


@pytest.mark.parametrize("length, scale, upstream", [(1.0, 1e-3, 1e7), (0.02, 2500.0, 0.1)])
def test_float16_weights_stay_in_range(length, scale, upstream, backend, guard):
    case = Case(N=60, D=16, dtype=torch.float16, scale=scale,
                options={"renormalize": True, "reduction": "sum"})  # fmt: skip
    plain = make_inputs(case)
    moved = {name: (length * getattr(plain, name).float()).half() for name in ("audio", "text")}
    inputs = replace(plain, **moved, radius=length * plain.radius, upstream=torch.tensor(upstream))
    accepted(case, inputs, backend)
