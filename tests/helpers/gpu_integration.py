"""The GPU backends as operators, on CPU tensors: statistics, frozen towers, scales, opcheck.

The folders that can run the kernels there import these tests, and give them their `backend`.
"""

from dataclasses import replace

import pytest
import torch
from hidden_pairs import faults, wrong_statistics
from integration_cases import OPTION_SETS, fused
from surroundings import changed, kernels, with_gradients
from torch import Tensor

import supclap_kernels as sk
from supclap_kernels.options import Options
from supclap_kernels.testing import DIFFERENTIABLE, Case, make_inputs

NARROW = {n: case for n, case in OPTION_SETS.items() if case.dtype != torch.float64}
every_case = pytest.mark.parametrize("case", NARROW.values(), ids=NARROW.keys())


def arguments_of(case: Case) -> tuple[Tensor | None, ...]:
    inputs = make_inputs(case)
    return tuple(getattr(inputs, name) for name in (*DIFFERENTIABLE, "ids", "weight"))


@every_case
def test_opcheck(case, backend):
    tensors, upstream = arguments_of(case), make_inputs(case).upstream
    options = Options(**case.options, backend=backend, stats=True)
    needs = tuple(x is not None for x in tensors[:5])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward = torch.ops.supclap_kernels.svr_loss.default
    torch.library.opcheck(forward, (*tensors, needs, *options), test_utils=checks)
    _, _, state, saved = outputs = forward(*tensors, needs, *options)
    backward = torch.ops.supclap_kernels.svr_loss_backward.default
    arguments = (upstream, *tensors, state, saved, needs, *options)
    torch.library.opcheck(backward, arguments, test_utils=checks)
    every = [x for x in (*outputs, *backward(*arguments), *tensors) if x is not None and x.numel()]
    assert len({x.untyped_storage().data_ptr() for x in every}) == len(every)


@every_case
def test_stats_are_those_of_the_specification(case, backend):
    inputs = make_inputs(case)
    values = []
    for x, given in ((inputs, backend), (inputs.to(torch.float64), "reference")):
        arguments = (getattr(x, name) for name in DIFFERENTIABLE)
        options = {**case.options, "return_stats": True, "backend": given}
        values.append(sk.fused_svr_loss(*arguments, ids=x.ids, weight=x.weight, **options)[1])
    rounding = 1e-2 if case.options.get("normalize") and case.dtype != torch.float32 else 3e-6
    for name, found, wanted in zip(sk.SVRStats._fields, *values, strict=True):
        assert found.dtype == torch.float32 and found.shape == ()
        error = abs(float(found) - float(wanted))
        assert error <= rounding * max(1.0, abs(float(wanted))) or (found != found), name
        assert bool(found.isnan()) == bool(wanted.isnan()), name


@pytest.mark.parametrize("options", [{}, {"objective": "siglip"}, {"bilateral": "shared"}])
def test_a_frozen_tower_costs_the_others_nothing(backend, options):
    inputs = make_inputs(Case(N=70, D=16, radius="row", gap=0.1, options=options))
    every = fused(Case(options=options), inputs, backend=backend)
    names = list(inputs.differentiable())
    for trained in names:
        leaves = {n: x.detach().clone() for n, x in inputs.differentiable().items()}
        leaves[trained].requires_grad_()
        loss = sk.fused_svr_loss(**leaves, backend=backend, **options)
        loss.backward(inputs.upstream)
        assert torch.equal(leaves[trained].grad, every[trained]), trained
        assert all(leaves[name].grad is None for name in names if name != trained)


def test_one_pair_costs_nothing(backend):
    for bilateral in ("none", "mirror", "shared"):
        inputs = make_inputs(Case(N=1, D=7))
        leaves = [x.clone().requires_grad_() for x in (inputs.audio, inputs.text)]
        loss = sk.fused_svr_loss(*leaves, 0.1, bilateral=bilateral, backend=backend)
        loss.backward()
        assert loss.item() == 0.0 and all(float(x.grad.abs().max()) == 0.0 for x in leaves)


def test_vectors_of_any_stride(backend):
    """Every second value of ids, weight and radius; an expanded radius and upstream gradient."""
    inputs = make_inputs(Case(N=40, D=16, radius="row", weighted=True, duplicates=True))
    vectors = {name: getattr(inputs, name) for name in ("radius", "ids", "weight")}
    twice = {name: torch.stack((x, x + 1), dim=1)[:, 0] for name, x in vectors.items()}
    results = []
    for given in (twice, {name: x.contiguous() for name, x in twice.items()}):
        leaf = inputs.audio.clone().requires_grad_()
        loss = sk.fused_svr_loss(leaf, inputs.text, reduction="none", backend=backend, **given)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert not torch.equal(results[0][0], sk.fused_svr_loss(
        inputs.audio, inputs.text, reduction="none", backend=backend))  # fmt: skip
    R = torch.tensor(0.2).expand(40)
    expanded, row = (sk.fused_svr_loss(inputs.audio, inputs.text, x, backend=backend)
                     for x in (R, R.contiguous()))  # fmt: skip
    assert torch.equal(expanded, row)


def test_one_column_expanded(backend):
    """Rows at the distance of contiguous ones whose columns are not neighbours."""
    inputs = make_inputs(Case(N=40, D=16))
    audio = inputs.audio[:, :1].expand(-1, 16)
    assert audio.stride() == (16, 0)
    expanded, packed = (sk.fused_svr_loss(x, inputs.text, 0.2, backend=backend)
                        for x in (audio, audio.contiguous()))  # fmt: skip
    assert torch.equal(expanded, packed)


@pytest.mark.parametrize("scale", [0.0, 100.0, -5.0])
def test_scales(backend, scale):
    """Equal logits, logits of +-100, and similar pairs that repel."""
    case = Case(N=40, D=16, radius="row", scale=scale, duplicates=True)
    inputs = make_inputs(case)
    arguments = (inputs.audio, inputs.text, inputs.radius, inputs.logit_scale)
    found = sk.fused_svr_loss(*arguments, ids=inputs.ids, backend=backend)
    exact = inputs.to(torch.float64)
    arguments = (exact.audio, exact.text, exact.radius, exact.logit_scale)
    wanted = sk.fused_svr_loss(*arguments, ids=inputs.ids, backend="reference")
    assert abs(float(found) - float(wanted)) < 3e-6 * float(wanted)


@pytest.mark.parametrize("bilateral", ["none", "mirror", "shared"])
def test_nan_and_infinity_are_not_hidden(backend, bilateral):
    for bad in (float("nan"), float("inf")):
        inputs = make_inputs(Case(N=40, D=16))
        inputs.audio[5, 3] = bad
        loss = sk.fused_svr_loss(
            inputs.audio, inputs.text, 0.1, bilateral=bilateral, backend=backend
        )
        assert not bool(torch.isfinite(loss))


def test_a_large_upstream_gradient_reaches_half_precision(backend):
    """GradScaler: 65536 arrives before the cast, so small gradients do not flush to zero."""
    case = Case(N=60, D=16, dtype=torch.float16, radius="row")
    inputs = make_inputs(case)
    scaled = replace(inputs, upstream=torch.tensor(1024.0))
    plain = fused(case, replace(inputs, upstream=torch.tensor(1.0)), backend=backend)
    large = fused(case, scaled, backend=backend)
    exact = fused(case, replace(inputs.to(torch.float64), upstream=torch.tensor(1.0)),
                  backend="reference")  # fmt: skip
    for name in ("audio", "text"):
        errors = [float((x[name].double() / s - exact[name]).norm()) for x, s in
                  ((plain, 1.0), (large, 1024.0))]  # fmt: skip
        assert errors[1] <= errors[0] * 1.01
        assert float((large[name] == 0).float().mean()) <= float((plain[name] == 0).float().mean())


def test_pytorchs_settings_do_not_matter(backend):
    siglip = {"objective": "siglip", "renormalize": False}
    cases = {
        "rows": Case(N=40, D=16, radius="row", gap=0.01),
        "siglip": Case(N=24, D=16, dtype=torch.bfloat16, duplicates=True, options=siglip),
        "plain siglip": Case(N=24, D=16, radius="none", options={"objective": "siglip"}),
        "shared": Case(N=40, D=24, dtype=torch.float16, options={"bilateral": "shared"}),
        "normalize": Case(N=40, D=16, options={"normalize": True, "reduction": "none"}),
    }
    assert not changed(kernels([backend], cases))


def test_hidden_pairs(backend):
    assert not faults(backend, torch.float32, (1, 9)) + wrong_statistics(backend)


def test_siglip_without_a_bias_under_other_settings(backend):
    """The kernels' own zero."""
    inputs = make_inputs(Case(N=40, D=16))
    siglip = {"objective": "siglip", "backend": backend}
    loss = lambda a, t: sk.fused_svr_loss(a, t, 0.1, 14.0, **siglip)  # noqa: E731
    assert not changed({"siglip": with_gradients(loss, inputs.audio, inputs.text)})
