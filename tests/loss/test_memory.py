"""`memory_estimate` against what PyTorch really allocates, and what a small workspace rules out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from allocations import Trace, traced
from torch import Tensor

import supclap_kernels as sk
from supclap_kernels import direct
from supclap_kernels.testing import Case, make_inputs

MIB = 2**20


def step_of(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; returns the gradients."""
    inputs = make_inputs(case)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
    fixed = {"ids": inputs.ids, "weight": inputs.weight}

    def step() -> tuple[Tensor, ...]:
        loss = sk.fused_svr_loss(**leaves, **fixed, **case.options)
        return torch.autograd.grad(loss, list(leaves.values()), inputs.upstream.to(loss.dtype))

    return step


def extra(case: Case) -> tuple[int, Trace]:
    """Bytes at the peak beyond the inputs and the returned gradients."""
    step = step_of(case)
    step()  # what the library sets up once
    trace, gradients = traced(step)
    return trace.peak - sum(g.numel() * g.element_size() for g in gradients), trace


def estimate(case: Case) -> int:
    options = {"radius": case.radius != "none", **case.options}
    return sk.memory_estimate(case.N, case.D, case.dtype, **options)


def test_the_measurement():
    def step() -> Tensor:
        x = torch.empty(1000)
        y = torch.empty(500)
        del y
        z = torch.empty(200)
        del z
        return x

    trace, x = traced(step)
    assert trace == (6000, 4000, 4000) and x.numel() == 1000


BASE = Case(N=800, D=256, options={"workspace": MIB})
ESTIMATED: dict[str, Case] = {
    "kept": Case(N=600, D=64),
    "kept, one tile": Case(N=300, D=64),
    "kept, plain": Case(N=1024, D=64, radius="none"),
    "kept, float64": Case(N=600, D=128, dtype=torch.float64, radius="scalar"),
    "kept, bfloat16": Case(N=600, D=64, dtype=torch.bfloat16),
    "recomputed": BASE,
    "recomputed, wide": replace(BASE, N=700, D=1024),
    "recomputed, narrow": replace(BASE, N=2000, D=32),
    "plain": replace(BASE, radius="none"),
    "one-sided": replace(BASE, options={"bilateral": "none", "workspace": MIB}),
    "shared": replace(BASE, options={"bilateral": "shared", "workspace": MIB}),
    "free": replace(BASE, options={"renormalize": False, "workspace": MIB}),
    "per row": replace(BASE, options={"reduction": "none", "workspace": MIB}),
    "alpha 0": replace(BASE, options={"alpha": 0.0, "workspace": MIB}),
    "float64": replace(BASE, dtype=torch.float64),
    "bfloat16": replace(BASE, dtype=torch.bfloat16),
    "float16, plain": replace(BASE, dtype=torch.float16, radius="none"),
    "bfloat16, wide": replace(BASE, N=700, D=1024, dtype=torch.bfloat16),
    "normalize": replace(BASE, options={"normalize": True, "workspace": MIB}),
    "bfloat16, normalize": replace(
        BASE, dtype=torch.bfloat16, options={"normalize": True, "workspace": MIB}
    ),
    "siglip": replace(BASE, options={"objective": "siglip", "workspace": MIB}),
    "siglip, large workspace": replace(BASE, options={"objective": "siglip"}),
    "siglip, wide": replace(BASE, N=700, D=1024, options={"objective": "siglip", "workspace": MIB}),
    "siglip, bfloat16": replace(
        BASE, dtype=torch.bfloat16, options={"objective": "siglip", "workspace": MIB}
    ),
    "siglip, normalize": replace(
        BASE, options={"objective": "siglip", "normalize": True, "workspace": MIB}
    ),
    "siglip, per row": replace(
        BASE, options={"objective": "siglip", "reduction": "none", "workspace": MIB}
    ),
    "ids and weight": replace(BASE, duplicates=True, weighted=True),
    "small": Case(N=200, D=64),
    "small, plain": Case(N=24, D=512, radius="none"),
    "small, per row": Case(N=200, D=64, options={"reduction": "none"}),
    "small, bfloat16": Case(N=200, D=256, dtype=torch.bfloat16, options={"normalize": True}),
    "small, float64": Case(N=64, D=256, dtype=torch.float64, options={"objective": "siglip"}),
}


@pytest.mark.parametrize("name", ESTIMATED)
def test_estimate_within_a_tenth(name, monkeypatch):
    """Of the operators; the short way of small batches takes less (test_direct.py)."""
    monkeypatch.setattr(direct, "loss_of", lambda *_: None)
    case = ESTIMATED[name]
    measured, _ = extra(case)
    ratio = estimate(case) / measured
    assert 0.9 <= ratio <= 1.1, f"{case}: estimate / measured = {ratio:.3f} of {measured} bytes"


LARGE: dict[str, dict[str, Any]] = {
    "plain": {"alpha": 0.0},
    "one-sided": {"bilateral": "none"},
    "shared": {"bilateral": "shared"},
    "mirror": {},
    "siglip": {"objective": "siglip"},
}


@pytest.mark.parametrize("mode", LARGE)
def test_a_large_batch_and_its_second_step(mode):
    """N = 16,384: logits alone would be 1 GiB. A second step takes what the first one took."""
    case = Case(N=16_384, D=32, options={**LARGE[mode], "workspace": 4 * MIB})
    step = step_of(case)
    first, gradients = traced(step)
    second, _ = traced(step)
    returned = sum(g.numel() * g.element_size() for g in gradients)
    assert second.peak <= first.peak and second.held <= first.held
    assert 0.9 <= estimate(case) / (second.peak - returned) <= 1.1


def test_the_workspace_decides_between_kept_and_recomputed():
    """At the boundary: one byte less, and the panels are gone, from both numbers."""
    case = Case(N=1200, D=32, radius="none")
    panels, beside = 1200 * 1200 * 4, 2 * 512 * 512 * 4
    for difference, kept in ((0, True), (-1, False)):
        workspace = panels + beside + difference
        at = replace(case, options={"workspace": workspace})
        measured, _ = extra(at)
        assert (measured >= panels) == kept
        assert (estimate(at) >= panels) == kept


@pytest.mark.parametrize("N", [600, 1500])
def test_kept_panels_and_scratch_stay_within_the_workspace(N):
    """Beyond the workspace there is only what is linear in N."""
    for bilateral in ("none", "mirror"):
        for workspace in (2**20, 2**23, 2**24):
            case = Case(N=N, D=16, options={"bilateral": bilateral, "workspace": workspace})
            measured, _ = extra(case)
            assert measured <= workspace + 400 * N


SWEEPS = [
    Case(D=64, options={"workspace": MIB}),
    Case(D=64, dtype=torch.bfloat16, options={"workspace": MIB}),
    Case(D=64, options={"workspace": MIB, "objective": "siglip"}),
    Case(D=64, weighted=True, duplicates=True, options={"workspace": MIB}),
    Case(D=64, options={"workspace": 2**18, "normalize": True}),
]


@pytest.mark.parametrize("case", SWEEPS, ids=str)
def test_linear_in_N(case):
    """Equal steps of N cost equal bytes: three points on a line, whose slope is a few rows."""
    sizes = (1024, 1536, 2048)
    measured = [extra(replace(case, N=N))[0] for N in sizes]
    first, second = measured[1] - measured[0], measured[2] - measured[1]
    assert abs(second - first) <= 0.05 * first + 4096, measured
    per_row = second / 512
    assert per_row <= 14 * case.D * 4 + 1024, f"{per_row} bytes for each row"
    guessed = [estimate(replace(case, N=N)) for N in sizes]
    assert abs(guessed[2] - 2 * guessed[1] + guessed[0]) <= 4096


def test_rows_with_a_tiny_gap_stay_linear():
    """Half of the rows take their support vector literally, in chunks of a fixed size."""
    case = Case(D=32, gap=1e-3, options={"workspace": MIB})
    first, second = (extra(replace(case, N=N))[0] for N in (1024, 1536))
    assert (second - first) / 512 <= 20 * case.D * 8 + 1024


@pytest.mark.parametrize("case", SWEEPS, ids=str)
def test_nothing_of_N_squared_with_a_small_workspace(case):
    N = 2048
    _, trace = extra(replace(case, N=N))
    assert trace.largest < N * N  # bytes: a quarter of one float32 matrix


def test_the_reference_would_be_noticed():
    """The same measurement sees the N x N matrices of the specification."""
    case = Case(N=700, D=16, options={"backend": "reference"})
    measured, trace = extra(case)
    assert trace.largest >= 4 * 700 * 700
    assert measured >= 8 * 4 * 700 * 700


def test_the_gradients_are_all_that_stays():
    for options in ({}, {"objective": "siglip"}, {"normalize": True}):
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(N=300, D=32, dtype=dtype, options=options)
            step = step_of(case)
            step()
            trace, gradients = traced(step)
            assert trace.held <= sum(g.numel() * g.element_size() for g in gradients) + 64, case


def test_a_frozen_tower_and_no_gradient_take_less():
    inputs = make_inputs(Case(N=600, D=256))
    audio, text = inputs.audio, inputs.text
    peaks = []
    for needed in ((True, True), (True, False), (False, False)):
        leaves = [x.detach().requires_grad_(n) for x, n in zip((audio, text), needed, strict=True)]

        def step(leaves: list[Tensor] = leaves, any_needed: bool = any(needed)) -> Tensor:
            loss = sk.fused_svr_loss(*leaves, 0.1, workspace=MIB)
            if any_needed:
                loss.backward()
            return loss

        step()
        for leaf in leaves:
            leaf.grad = None
        peaks.append(traced(step)[0].peak)
    assert peaks[0] - peaks[1] >= 0.9 * 600 * 256 * 4
    assert peaks[1] > peaks[2]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("stats", [False, True])
def test_an_estimate_in_every_mode_of_autograd(backend, mode, stats):
    wanted = sk.memory_estimate(64, 8, backend=backend, stats=stats)
    with mode():
        assert sk.memory_estimate(64, 8, backend=backend, stats=stats) == wanted
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)


@pytest.mark.parametrize("radius", ["none", "scalar"])
@pytest.mark.parametrize("objective", ["infonce", "siglip"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_estimates_of_the_reference(radius, objective, reduction):
    options = {"backend": "reference", "objective": objective, "reduction": reduction}
    case = Case(N=500, D=16, radius=radius, options=options)
    measured, _ = extra(case)
    assert 0.85 * measured <= estimate(case) <= 1.15 * measured  # logsigmoid of a CPU has a buffer
