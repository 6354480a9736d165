"""The backends of csrc/cuda as operators."""

import pytest
import torch
from allocations import traced
from gpu_integration import (  # noqa: F401 - tests
    test_a_frozen_tower_costs_the_others_nothing,
    test_a_large_upstream_gradient_reaches_half_precision,
    test_hidden_pairs,
    test_nan_and_infinity_are_not_hidden,
    test_one_column_expanded,
    test_one_pair_costs_nothing,
    test_opcheck,
    test_pytorchs_settings_do_not_matter,
    test_scales,
    test_siglip_without_a_bias_under_other_settings,
    test_stats_are_those_of_the_specification,
    test_vectors_of_any_stride,
)
from integration_cases import fused, same

import supclap_kernels as sk
from supclap_kernels import direct, dispatch, native
from supclap_kernels.backends.call import Tensors
from supclap_kernels.backends.cuda import single, sweeps
from supclap_kernels.backends.footprint import peak_bytes, whole_pass
from supclap_kernels.options import Options
from supclap_kernels.testing import Case, check, make_inputs

by_mode = pytest.mark.parametrize(
    "options",
    [{}, {"objective": "siglip"}, {"bilateral": "none"}, {"bilateral": "shared"}],
    ids=str,
)


@by_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_grid_or_the_order(options, dtype, device):
    case = Case(N=100, D=24, dtype=dtype, gap=0.05, radius="row", options=options)
    inputs = make_inputs(case)
    runs = []
    for multiprocessors in (5, 8, 31):
        for schedule in range(native.cuda().SCHEDULES):
            device.set(multiprocessors, schedule, 16)
            runs.append(fused(case, inputs, backend=device.way))
    assert all(same(runs[0], other) for other in runs[1:])


@by_mode
def test_a_batch_that_does_not_fit_takes_the_panels(options, monkeypatch):
    monkeypatch.setattr(single, "limit", lambda *_: 299)
    direct.forget()
    for N in (299, 300):
        case = Case(N=N, D=40, radius="row", options=options)
        inputs = make_inputs(case)
        taken = fused(case, inputs, backend="cuda")
        assert same(taken, fused(case, inputs, backend="cuda:panel")) == (N == 300)
    with pytest.raises(RuntimeError, match="takes up to 299 pairs here, got 300"):
        fused(case, inputs, backend="cuda:single")
    direct.forget()


@by_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N, D", [(300, 40), (800, 24)], ids=str)
def test_larger_batches(options, dtype, N, D, device):
    """Sides as they are chosen: 32 and 64, several pairs to a block."""
    device.set(40, 1, 0)
    case = Case(N=N, D=D, dtype=dtype, radius="row", options=options)
    check(sk.fused_svr_loss, case, rounded_weights=dtype != torch.float32, backend="cuda")


@by_mode
def test_without_a_gradient_only_the_loss(options):
    case = Case(N=50, D=16, radius="row", options=options)
    inputs = make_inputs(case)
    arguments = (inputs.audio, inputs.text, inputs.radius, inputs.logit_scale, inputs.logit_bias)
    loss = sk.fused_svr_loss(*arguments, backend="cuda", **options)
    with_gradient = fused(case, inputs, backend="cuda")["loss"]
    assert torch.equal(loss, with_gradient) and not loss.requires_grad


@by_mode
def test_backward_twice(options):
    """retain_graph: another upstream gradient, and nothing that the first one left."""
    inputs = make_inputs(Case(N=50, D=16, radius="row", options=options))
    leaf = inputs.audio.clone().requires_grad_()
    loss = sk.fused_svr_loss(leaf, inputs.text, inputs.radius, backend="cuda", **options)
    first, second, third = (
        torch.autograd.grad(loss, leaf, torch.tensor(g), retain_graph=True)[0]
        for g in (1.0, 4.0, 1.0)
    )
    assert torch.equal(4.0 * first, second) and torch.equal(first, third)


def test_capacity():
    """The largest batch that fits on the chip of an H200 (132 x 227 KiB), an A100 (108 x 163)."""
    found = {}
    for name, chip in (("H200", (132, 227 * 1024)), ("A100", (108, 163 * 1024))):
        for mode in ("none", "one-sided", "mirror"):
            p = native.cuda().CudaProblem()
            p.width, p.dtype, p.infonce = 512, sweeps.DTYPES[torch.bfloat16], True
            p.mode = {"none": 0, "one-sided": 1, "mirror": 3}[mode]
            found[name, mode] = native.cuda().single_limit(p, 0, *chip)
    assert found == {
        ("H200", "none"): 2496, ("H200", "one-sided"): 2048, ("H200", "mirror"): 1728,
        ("A100", "none"): 1792, ("A100", "one-sided"): 1280, ("A100", "mirror"): 1280,
    }  # fmt: skip


def test_which_backend_is_chosen():
    available = dispatch.available_backends()
    assert available["panel"] == available["cuda"] == "ok"
    assert dispatch.choose("auto", "cpu")[0] == "cpu"
    with pytest.raises(RuntimeError, match="float64"):
        x = torch.randn(4, 8, dtype=torch.float64)
        sk.fused_svr_loss(x, x, backend="cuda")


@pytest.mark.parametrize("backend", [single.Single(), sweeps.PANEL], ids=["cuda", "panel"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "siglip"},
        {"reduction": "none"},
        {"normalize": True},
        {"bilateral": "none"},
    ],
    ids=str,
)
def test_memory_estimate_within_a_tenth(options, backend, monkeypatch, device):
    """What is allocated, with the launches left out."""
    device.set(40, 0, 0)
    for name in dir(native.cuda()):
        if (
            name.startswith(("pack", "prepare", "panel", "literal", "list", "start", "finish"))
            or name == "single"
        ):
            monkeypatch.setattr(native.cuda(), name, lambda *_: None)
    case = Case(N=500, D=256, options={"workspace": 2**17, **options})
    given, chosen = make_inputs(case), Options(**case.options)
    inputs = Tensors(given.audio, given.text, given.radius, given.logit_scale, given.logit_bias,
                    given.ids, given.weight)  # fmt: skip
    needs = (True, True, True, True, False)

    def step() -> tuple[torch.Tensor, ...]:
        _, _, state, saved = backend.forward(inputs, chosen, needs)
        return backend.backward(inputs, chosen, needs, given.upstream, state, saved)

    step()
    trace, gradients = traced(step)
    found = trace.peak - sum(g.numel() * g.element_size() for g in gradients if g is not None)
    guess = peak_bytes(whole_pass(backend, chosen), 500, 256, torch.float32, True, chosen)
    assert 0.9 <= guess / found <= 1.1, f"estimated {guess}, measured {found} bytes"
