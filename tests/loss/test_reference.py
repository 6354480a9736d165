"""The specification: derivatives, invariants, and the closed form."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from supclap_kernels import svr_loss_reference
from supclap_kernels.gradients import loss_and_gradients
from supclap_kernels.testing import DIFFERENTIABLE, Case, evaluate, make_inputs

ALL = [
    {"objective": objective, "bilateral": bilateral, "renormalize": renormalize}
    for objective, bilateral, renormalize in itertools.product(
        ("infonce", "siglip"), ("none", "mirror", "shared"), (False, True)
    )
]


def relative(value, wanted) -> float:
    return float((value - wanted).norm() / wanted.norm().clamp_min(1e-300))


@pytest.mark.parametrize("options", ALL, ids=str)
def test_first_and_second_derivative(options):
    case = Case(N=4, D=3, dtype=torch.float64, scale=2.0, radius="row", options=options)
    inputs = make_inputs(case)
    leaves = [value.detach().requires_grad_() for value in inputs.differentiable().values()]

    def loss(*arguments):
        return svr_loss_reference(*arguments, beta=0.1, **options)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("options", ALL, ids=str)
@pytest.mark.parametrize("duplicates", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("radius", ["none", "scalar", "row"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_closed_form(options, duplicates, reduction, radius, weighted):
    for normalize, gap in ((False, 0.5), (True, 0.5), (False, 1e-2)):
        options = {**options, "reduction": reduction, "normalize": normalize}
        options = {**options, "alpha": 0.8, "beta": 0.3}
        case = Case(
            N=23,
            D=11,
            dtype=torch.float64,
            gap=gap,
            radius=radius,
            duplicates=duplicates,
            weighted=weighted,
            options=options,
        )
        inputs = make_inputs(case)
        wanted = evaluate(svr_loss_reference, inputs, **options)
        arguments = (getattr(inputs, name) for name in DIFFERENTIABLE)
        loss, gradients = loss_and_gradients(
            *arguments, ids=inputs.ids, weight=inputs.weight, upstream=inputs.upstream, **options
        )
        assert relative(loss, wanted["loss"]) < 1e-12
        for name in inputs.differentiable():
            value = getattr(gradients, name)
            value = value.sum() if radius == "scalar" and name == "radius" else value
            assert relative(value, wanted[name]) < 1e-12, name


def plain_infonce(audio, text, scale):
    labels = torch.arange(len(audio))
    logits = scale * text @ audio.t()
    return F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)


def test_without_a_radius_it_is_infonce():
    inputs = make_inputs(Case(dtype=torch.float64))
    a, t, k = inputs.audio, inputs.text, inputs.logit_scale
    wanted = plain_infonce(a, t, k)
    assert relative(svr_loss_reference(a, t, None, k), wanted) < 1e-14
    assert relative(svr_loss_reference(a, t, 0.3, k, alpha=0.0), wanted) < 1e-14


def test_zero_radius_doubles_a_direction():
    inputs = make_inputs(Case(dtype=torch.float64))
    a, t, k = inputs.audio, inputs.text, inputs.logit_scale
    plain = svr_loss_reference(a, t, None, k)
    for bilateral in ("mirror", "shared"):
        assert relative(svr_loss_reference(a, t, 0.0, k, bilateral=bilateral), 2 * plain) < 1e-14


def test_short_support_vectors_are_literal():
    """a is nearly -t and R is r / 2, so t_sup is short: differences of products would lose four
    times as many of its digits as the rows themselves do."""
    exact = make_inputs(Case(N=32, D=16, dtype=torch.float64, radius="row", gap=0.5))
    exact.audio[3:9] = -exact.text[3:9]
    exact.audio[3:9, 0] += 0.01
    exact.radius[3:9] = (exact.audio[3:9] - exact.text[3:9]).norm(dim=1) / 2
    names = ("audio", "text", "radius", "logit_scale")
    rounded = [getattr(exact, name).float() for name in names]
    gradients = loss_and_gradients(*rounded, renormalize=True)[1]
    wanted = loss_and_gradients(*(x.double() for x in rounded), renormalize=True)[1]
    for name, bound in (("audio", 2.5e-5), ("text", 2.5e-5), ("radius", 6e-6)):
        assert relative(getattr(gradients, name).double(), getattr(wanted, name)) < bound, name


def test_order_of_the_pairs_does_not_matter():
    inputs = make_inputs(Case(dtype=torch.float64, radius="row"))
    order = torch.randperm(len(inputs.audio), generator=torch.Generator().manual_seed(1))
    a, t, R, k = inputs.audio, inputs.text, inputs.radius, inputs.logit_scale
    moved = svr_loss_reference(a[order], t[order], R[order], k, reduction="none")
    rows = svr_loss_reference(a, t, R, k, reduction="none")
    assert relative(moved, rows[order]) < 1e-13


def test_siglip_by_hand():
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    audio = torch.tensor([[0.6, 0.8], [1.0, 0.0]], dtype=torch.float64)
    logits = 2.0 * torch.tensor([[0.6, 1.0], [0.8, 0.0]], dtype=torch.float64) - 1.0
    sign = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    wanted = torch.log1p((sign * logits).exp()).sum() / 2
    value = svr_loss_reference(audio, text, None, 2.0, -1.0, objective="siglip")
    assert relative(value, wanted) < 1e-15


def test_constraint_by_hand():
    inputs = make_inputs(Case(N=6, dtype=torch.float64, radius="row"))
    a, t, R, k = inputs.audio, inputs.text, inputs.radius, inputs.logit_scale
    r = ((a - t).square().sum(1) + 1e-8).sqrt()
    wanted = (F.relu(R - r) + F.relu(-R)).mean()
    with_beta = svr_loss_reference(a, t, R, k, beta=0.7)
    without = svr_loss_reference(a, t, R, k)
    assert abs(float(with_beta - without - 0.7 * wanted)) < 1e-13
