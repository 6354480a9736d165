"""Mixed precision, scaling, and what autograd may ask of the loss."""

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from integration_cases import every_option_set, fused, leaves_of, same
from torch import Tensor, nn

import supclap_kernels as sk
from supclap_kernels.testing import (
    Case,
    baseline,
    evaluate,
    floors,
    make_inputs,
    truth,
    violations,
)

# --------------------------------------------------------------------- mixed precision and scaling


@every_option_set
def test_autocast_changes_nothing(case):
    """Forward and backward: the accumulation stays in the accumulator's dtype."""
    inputs = make_inputs(case)
    plain = fused(case, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert same(fused(case, inputs), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_towers_feed_the_loss(dtype):
    """Embeddings that autocast made narrow arrive as such, and their gradients go back through."""
    generator = torch.Generator().manual_seed(0)
    tower = nn.Linear(8, 16)
    x = torch.randn(12, 8, generator=generator)
    with torch.autocast("cpu", dtype=dtype):
        audio, text = tower(x), tower(2 * x)
        assert audio.dtype == dtype
        loss = sk.fused_svr_loss(audio, text, 0.1, normalize=True)
    loss.backward()
    assert loss.dtype == torch.float32 and tower.weight.grad.dtype == torch.float32
    assert torch.isfinite(tower.weight.grad).all() and tower.weight.grad.abs().max() > 0


SCALED: list[Case] = [
    Case(N=64, D=32, dtype=torch.float16, radius="row"),
    Case(N=64, D=32, dtype=torch.float16, scale=4.0, options={"objective": "siglip"}),
    Case(N=64, D=32, dtype=torch.float16, options={"normalize": True}),
    Case(N=64, D=32, dtype=torch.float16, radius="none", options={"workspace": 0}),
]


@pytest.mark.parametrize("case", SCALED, ids=str)
def test_gradient_scaler(case):
    """float16 under a factor of 65536: nothing overflows, the unscaled gradients pass the rule."""
    factor = 65536.0
    inputs = make_inputs(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=factor)

    def scaled(*arguments: Tensor, **options: Any) -> Tensor:
        return scaler.scale(sk.fused_svr_loss(*arguments, **options))

    found = evaluate(scaled, inputs, **case.options)
    assert found["text"].dtype == torch.float16 and found["text"].abs().max() > 100
    result = {name: (x.double() / factor).to(x.dtype) for name, x in found.items()}
    exact = truth(case, inputs)
    wrong = violations(result, exact, baseline(case, inputs), floors(case, inputs, exact))
    assert not wrong, wrong


# -------------------------------------------------------------------------------------- the graph


@every_option_set
def test_retain_graph_twice(case):
    """A second backward is repeatable and linear in the upstream gradient (here: times 4)."""
    inputs = make_inputs(case)
    leaves = leaves_of(inputs)
    arguments = dict(zip(inputs.differentiable(), leaves, strict=True))
    options = {**case.options, "ids": inputs.ids, "weight": inputs.weight}
    loss = sk.fused_svr_loss(**arguments, **options)
    upstream = inputs.upstream.to(loss.dtype)
    first, second, again = (
        torch.autograd.grad(loss, leaves, factor * upstream, retain_graph=True)
        for factor in (1.0, 4.0, 1.0)
    )
    for x, y, z in zip(first, second, again, strict=True):
        assert torch.equal(4.0 * x, y)  # a power of two: exact
        assert torch.equal(x, z)
        assert x.abs().max() > 0
    last = torch.autograd.grad(loss, leaves, 3.0 * upstream)
    for x, y in zip(first, last, strict=True):
        bound = 20 * max(torch.finfo(x.dtype).eps, torch.finfo(loss.dtype).eps)
        assert (3.0 * x.double() - y.double()).norm() <= bound * y.double().norm()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves, upstream)


def test_one_gradient_accumulates_over_two_losses():
    inputs = make_inputs(Case(dtype=torch.float64))
    audio, text = (x.clone().requires_grad_() for x in (inputs.audio, inputs.text))
    single = torch.autograd.grad(sk.fused_svr_loss(audio, text, 0.1), audio)[0]
    (sk.fused_svr_loss(audio, text, 0.1) + sk.fused_svr_loss(audio, text, 0.1)).backward()
    assert torch.equal(audio.grad, 2.0 * single)


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_every_subset_of_gradients(objective):
    """Frozen inputs keep `.grad is None`; the others get the bits they get together."""
    case = Case(radius="row", weighted=True, options={"objective": "siglip", "beta": 0.1})
    inputs = make_inputs(case)
    arguments = inputs.differentiable()
    options = {**case.options, "objective": objective}
    if objective == "infonce":
        del arguments["logit_bias"]
    whole: dict[str, Tensor] = {}
    for chosen in itertools.product((True, False), repeat=len(arguments)):
        leaves = {
            name: x.detach().clone().requires_grad_(need)
            for (name, x), need in zip(arguments.items(), chosen, strict=True)
        }
        loss = sk.fused_svr_loss(**leaves, weight=inputs.weight, **options)
        assert loss.requires_grad == any(chosen)
        if any(chosen):
            loss.backward()
        if all(chosen):
            whole = {name: leaf.grad for name, leaf in leaves.items()}
            assert all(g.abs().max() > 0 for g in whole.values())
        for (name, leaf), need in zip(leaves.items(), chosen, strict=True):
            if need:
                assert torch.equal(leaf.grad, whole[name]), (name, chosen)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("frozen", ["audio", "text"])
def test_a_frozen_tower_costs_nothing(frozen, monkeypatch):
    """Half of the gradient's products are left out."""
    from supclap_kernels.backends.cpu import call
    from supclap_kernels.backends.products import LibraryProducts

    counted = []
    original = LibraryProducts.accumulate

    def accumulate(self: LibraryProducts, *arguments: Tensor) -> None:
        counted.append(1)
        original(self, *arguments)

    monkeypatch.setattr(LibraryProducts, "accumulate", accumulate)
    monkeypatch.setattr(call, "multiplies_itself", lambda: False)
    counts = []
    for names in ({"audio", "text"}, {"audio", "text"} - {frozen}):
        inputs = make_inputs(Case())
        leaves = {n: getattr(inputs, n).requires_grad_(n in names) for n in ("audio", "text")}
        counted.clear()
        sk.fused_svr_loss(**leaves, radius=0.1, backend="cpu:panel").backward()
        counts.append(len(counted))
    assert counts[0] == 2 * counts[1] > 0


def test_only_the_inputs_asked_for_get_gradients():
    """torch.autograd.grad of one input of several that require it."""
    inputs = make_inputs(Case())
    leaves = leaves_of(inputs)
    arguments = dict(zip(inputs.differentiable(), leaves, strict=True))
    whole = torch.autograd.grad(sk.fused_svr_loss(**arguments), leaves)
    for leaf, wanted in zip(leaves, whole, strict=True):
        (gradient,) = torch.autograd.grad(sk.fused_svr_loss(**arguments), leaf)
        assert torch.equal(gradient, wanted)
        assert all(other.grad is None for other in leaves)


@every_option_set
def test_no_grad_and_inference_mode(case):
    inputs = make_inputs(case)
    leaves = leaves_of(inputs)
    arguments = dict(zip(inputs.differentiable(), leaves, strict=True))
    options = {**case.options, "ids": inputs.ids, "weight": inputs.weight, "return_stats": True}
    loss, stats = sk.fused_svr_loss(**arguments, **options)
    assert loss.requires_grad and not any(value.requires_grad for value in stats)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            other, values = sk.fused_svr_loss(**arguments, **options)
        assert not other.requires_grad
        if not case.options.get("objective") == "siglip":  # one sweep instead of two
            assert torch.equal(other, loss.detach())
        assert abs(float((other - loss.detach()).norm())) <= 1e-6 * float(loss.detach().norm())
        for x, y in zip(values, stats, strict=True):
            assert torch.equal(x.isnan(), y.isnan())
            assert bool((x - y).abs() <= 1e-6 * y.abs()) or bool(y.isnan())


def test_inference_tensors_as_inputs():
    with torch.inference_mode():
        audio, text = torch.randn(2, 9, 5).unbind()
        inside = sk.fused_svr_loss(audio, text, 0.1)
    assert torch.equal(inside, sk.fused_svr_loss(audio, text, 0.1))


@pytest.mark.parametrize("options", [{}, {"objective": "siglip"}, {"reduction": "none"}])
def test_second_derivative_is_a_clear_error(options):
    inputs = make_inputs(Case(N=5, D=4))
    audio = inputs.audio.requires_grad_()
    loss = sk.fused_svr_loss(audio, inputs.text, 0.1, **options).sum()
    (gradient,) = torch.autograd.grad(loss, audio, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(gradient.sum(), audio)


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_second_derivative_of_the_reference(objective):
    case = Case(N=4, D=3, dtype=torch.float64, radius="row", options={"objective": objective})
    inputs = make_inputs(case)
    names = list(inputs.differentiable())

    def loss(*leaves: Tensor) -> Tensor:
        arguments = dict(zip(names, leaves, strict=True))
        return sk.fused_svr_loss(**arguments, backend="reference", beta=0.1, **case.options)

    assert torch.autograd.gradcheck(loss, leaves_of(inputs))
    assert torch.autograd.gradgradcheck(loss, leaves_of(inputs))


def test_gradcheck_of_the_operator():
    case = Case(N=5, D=3, dtype=torch.float64, radius="row")
    inputs = make_inputs(case)
    names = list(inputs.differentiable())

    def loss(*leaves: Tensor) -> Tensor:
        return sk.fused_svr_loss(**dict(zip(names, leaves, strict=True)), reduction="none")

    assert torch.autograd.gradcheck(loss, leaves_of(inputs))


def test_create_graph_beside_a_penalty_of_another_part():
    """A gradient penalty elsewhere: our part is in the graph, but not differentiated twice."""
    inputs = make_inputs(Case(dtype=torch.float64))
    tower = nn.Linear(19, 19, dtype=torch.float64)
    audio = tower(inputs.audio)
    penalised = audio.detach().requires_grad_()
    inner = nn.functional.softplus(tower(penalised)).sum()
    (slope,) = torch.autograd.grad(inner, penalised, create_graph=True)
    loss = sk.fused_svr_loss(audio, inputs.text, 0.1)
    total = loss + slope.square().sum()
    ours = torch.autograd.grad(loss, tower.weight, retain_graph=True)[0]
    penalty = torch.autograd.grad(slope.square().sum(), tower.weight, retain_graph=True)[0]
    (whole,) = torch.autograd.grad(total, tower.weight, create_graph=True)
    difference = whole.detach() - ours - penalty
    assert difference.norm() <= 1e-12 * whole.detach().norm()


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_upstream_gradient_per_row(objective):
    """`none` with rows of ones over N is `mean`; one row alone is that row's own terms."""
    case = Case(N=33, dtype=torch.float64, radius="row", options={"objective": objective})
    inputs = make_inputs(case)
    leaves = leaves_of(inputs)
    arguments = dict(zip(inputs.differentiable(), leaves, strict=True))
    rows = sk.fused_svr_loss(**arguments, reduction="none", **case.options)
    mean = torch.autograd.grad(sk.fused_svr_loss(**arguments, **case.options), leaves)
    even = torch.autograd.grad(rows, leaves, torch.full((33,), 1 / 33).double(), retain_graph=True)
    for x, y in zip(even, mean, strict=True):
        assert (x - y).norm() <= 1e-7 * y.norm()  # 1/33 was rounded to float32
    for upstream in (torch.eye(33).double()[7], torch.ones(()).double().expand(33)):
        check_upstream = torch.autograd.grad(rows, leaves, upstream, retain_graph=True)
        spec = sk.svr_loss_reference(**arguments, reduction="none", **case.options)
        for x, y in zip(check_upstream, torch.autograd.grad(spec, leaves, upstream), strict=True):
            assert (x - y).norm() <= 1e-12 * y.norm()


@pytest.mark.parametrize("layout", ["transposed", "offset", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layout_does_not_matter(layout, dtype):
    case = Case(N=70, dtype=dtype, radius="row")
    plain = fused(case, make_inputs(case))
    assert same(fused(case, make_inputs(replace(case, layout=layout))), plain)


@pytest.mark.parametrize("backend", ["cpu:small", "cpu:panel"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tensors_whose_memory_is_not_their_values(backend, reduction):
    """PyTorch negates in name only (the imaginary part of a conjugate), and knows zeros that have
    no memory at all."""
    case = Case(radius="scalar", weighted=True, options={"reduction": reduction})
    inputs = make_inputs(case)
    loss = functools.partial(sk.fused_svr_loss, backend=backend)
    plain = evaluate(loss, inputs, **case.options)
    changed = {
        name: torch._neg_view(-x) if x is not None and x.is_floating_point() else x
        for name, x in vars(inputs).items()
    }
    negated = evaluate(loss, replace(inputs, **changed), **case.options)
    assert all(torch.equal(plain[name], negated[name]) for name in plain)
    zeros = torch._efficientzerotensor(inputs.audio.shape)
    same = loss(zeros, inputs.text, inputs.radius, **case.options)
    assert torch.equal(loss(torch.zeros(37, 19), inputs.text, inputs.radius, **case.options), same)
    audio = inputs.audio.clone().requires_grad_()
    value = loss(audio, inputs.text, **case.options)
    nothing = torch._efficientzerotensor(value.shape)
    assert torch.autograd.grad(value, audio, nothing)[0].count_nonzero() == 0


def test_expanded_and_reversed_inputs():
    inputs = make_inputs(Case(N=20))
    row = inputs.audio[:1].expand(20, -1)
    assert torch.equal(
        sk.fused_svr_loss(row, inputs.text, 0.1), sk.fused_svr_loss(row.clone(), inputs.text, 0.1)
    )
    radius = torch.tensor(0.1, requires_grad=True)
    sk.fused_svr_loss(inputs.audio, inputs.text, radius.expand(20)).backward()
    first, radius.grad = radius.grad, None
    sk.fused_svr_loss(inputs.audio, inputs.text, radius).backward()
    assert (first - radius.grad).abs() <= 1e-6 * first.abs()
