"""Numbers of any kind, where a number is asked for."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from interface_cases import A, T

import supclap_kernels as sk

KINDS = [np.float32, np.float64, np.float16, np.array, Fraction, int]
FUNCTIONS = [sk.fused_svr_loss, sk.svr_loss_reference]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["radius", "logit_scale", "logit_bias", "alpha", "beta"])
def test_any_number(name, function, kind):
    given = {"radius": 0.5, "logit_scale": 4.0, "logit_bias": -1.0, "alpha": 0.5, "beta": 0.25}
    given["objective"] = "siglip"
    number = kind(2 if kind is int else given[name])
    results = []
    for value in (float(number), number):
        leaves = [x.clone().requires_grad_() for x in (A, T)]
        loss = function(*leaves, **{**given, name: value})
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.array])
def test_any_integer(kind, backend):
    wanted = sk.fused_svr_loss(A, T, 0.1, workspace=200, backend=backend)
    found = sk.fused_svr_loss(A, T, 0.1, workspace=kind(200), backend=backend)
    assert torch.equal(found, wanted)


def test_modules_and_forces():
    given = {"alpha": np.float32(0.5), "beta": np.float32(0.25), "workspace": np.int64(2**20)}
    plain = {name: float(x) if name != "workspace" else int(x) for name, x in given.items()}
    losses = [
        sk.SVRLoss(sk.StaticRadius(np.float32(0.5)), **options)(A, T, scale)
        for options, scale in ((given, np.float32(4.0)), (plain, 4.0))
    ]
    assert torch.equal(*losses)
    dynamic = sk.DynamicRadius(features="summary", init=np.float32(0.5))
    assert torch.equal(dynamic(A, T, np.float32(4.0)), dynamic(A, T, 4.0))
    forces = [
        sk.force_decomposition(A, T, kind(0.5), kind(4.0), alpha=kind(0.5), beta=kind(0.25))
        for kind in (float, np.float32)
    ]
    assert all(map(torch.equal, *forces))


@pytest.mark.parametrize("name", ["radius", "logit_scale", "alpha", "beta", "workspace"])
@pytest.mark.parametrize("wrong", [np.ones(1), np.array("1"), np.complex64(1), 1j, "1"], ids=repr)
def test_what_is_no_number(name, wrong):
    with pytest.raises(TypeError, match=f"{name} must be .*(number|int)"):
        sk.fused_svr_loss(A, T, **{"radius": 0.1, name: wrong})


@pytest.mark.parametrize("name", ["radius", "logit_scale", "workspace"])
def test_a_truth_is_no_number(name):
    for wrong in (True, np.bool_(True), np.array(True)):
        with pytest.raises(TypeError, match=f"{name} must be .*bool"):
            sk.fused_svr_loss(A, T, **{"radius": 0.1, name: wrong})
