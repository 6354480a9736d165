"""Rows without a negative that counts, hidden by ids or weighted 0: everything stays finite and
right."""

import pytest
import rank_hidden as hidden
import torch
from hidden_pairs import HIDDEN, MODES, faults, wrong_statistics
from interface_cases import close
from ranks import run

import supclap_kernels as sk
from supclap_kernels.testing import DIFFERENTIABLE, Case, make_inputs

every_way = pytest.mark.parametrize("change", HIDDEN.values(), ids=HIDDEN.keys())
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_gradient(backend, dtype, poisoned_memory):
    assert not faults(backend, dtype, (1, 2, 9))


@pytest.mark.parametrize("scale", [0.0, -14.0, 3e4])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_scale(backend, scale, poisoned_memory):
    """Pairs stay hidden where the scale takes, or turns, what marks them."""
    assert not faults(backend, torch.float32, (1, 9), scale)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_statistics(backend, poisoned_memory):
    assert not wrong_statistics(backend)


@pytest.mark.parametrize(
    "backend, exchange", [("cpu", "gather"), ("cpu", "ring"), ("reference", "gather")]
)
def test_over_ranks(backend, exchange):
    for found in run(3, hidden.faults, backend, exchange):
        assert not found


@every_way
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_second_derivatives_of_the_specification(mode, change):
    """Where nothing is left to train they are 0, and finite everywhere."""
    objective, bilateral = mode
    inputs = change(
        make_inputs(Case(N=3, D=4, dtype=torch.float64, options={"objective": objective}))
    )
    leaves = [x.requires_grad_() for x in inputs.differentiable().values()]
    names = [*inputs.differentiable()]

    def loss(*given):
        arguments = dict(zip(names, given, strict=True))
        options = {"objective": objective, "bilateral": bilateral, "beta": 0.3}
        return sk.svr_loss_reference(
            *(arguments.get(name) for name in DIFFERENTIABLE),
            ids=inputs.ids,
            weight=inputs.weight,
            **options,
        )

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@every_way
@pytest.mark.parametrize("N", [1, 9])
@pytest.mark.parametrize("features", ["summary", "similarities"])
@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_a_dynamic_radius(objective, features, N, change):
    """Every gradient, the network's as well, is that of float64."""
    inputs = change(make_inputs(Case(N=N, D=12)))
    torch.manual_seed(0)
    radius = sk.DynamicRadius(N, features=features)
    torch.nn.init.normal_(radius.network[-1].weight, std=0.02)
    found = []
    for dtype, backend in ((torch.float32, "auto"), (torch.float64, "reference")):
        given, module = inputs.to(dtype), radius.to(dtype)
        criterion = sk.SVRLoss(module, objective, beta=0.3, backend=backend)
        leaves = [x.requires_grad_() for x in (given.audio, given.text, given.logit_scale)]
        leaves += module.parameters()
        loss = criterion(*leaves[:3], ids=given.ids, weight=given.weight)
        found.append(torch.autograd.grad(loss, leaves))
    for ours, exact in zip(*found, strict=True):
        assert bool(ours.isfinite().all()) and bool(exact.isfinite().all())
        assert close(ours, exact, 1e-4) or float(exact.abs().max()) < 1e-7


@every_way
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_forces(mode, change):
    objective, bilateral = mode
    for N in (1, 9):
        x = change(make_inputs(Case(N=N, D=12, options={"objective": objective})))
        found = sk.force_decomposition(
            x.audio, x.text, x.radius, x.logit_scale, x.logit_bias, ids=x.ids, weight=x.weight,
            objective=objective, bilateral=bilateral,
        )  # fmt: skip
        assert all(bool(value.isfinite().all()) for value in found)
