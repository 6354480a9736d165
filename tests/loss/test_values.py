"""Facts about the value of the loss that need no tolerance."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interface_cases import FLOATS, A, N, T, close, rows
from torch import Tensor

import supclap_kernels as sk
from supclap_kernels.testing import Case, check

# --------------------------------------------------------------------------------------- the values


def l_orig(audio: Tensor, text: Tensor, k: float) -> Tensor:
    """InfoNCE as everyone writes it, in float64: the sum of both directions."""
    logits, labels = k * text.double() @ audio.double().t(), torch.arange(len(audio))
    return F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)


@pytest.mark.parametrize("n", [2, 37, 129])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_radius_it_is_the_plain_loss(n, backend):
    audio, text = rows(n, 16, torch.float64, 1), rows(n, 16, torch.float64, 2)
    loss = sk.fused_svr_loss(audio, text, logit_scale=9.0, backend=backend)
    assert close(loss, l_orig(audio, text, 9.0), 1e-14)


@pytest.mark.parametrize("options", [{}, {"objective": "siglip", "logit_bias": -3.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_and_beta_zero_is_the_plain_loss(options, dtype):
    """Exactly, gradients included; the radius then gets the gradient 0."""
    results = []
    for radius in (None, torch.full((37,), 0.2, dtype=dtype, requires_grad=True)):
        leaves = [rows(37, 16, dtype, seed).requires_grad_() for seed in (1, 2)]
        loss = sk.fused_svr_loss(*leaves, radius, alpha=0.0, beta=0.0, **options)
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert radius is not None and torch.equal(radius.grad, torch.zeros_like(radius))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("radius", [None, 0.1])
def test_one_pair_costs_nothing(backend, dtype, radius):
    for bilateral in ("none", "mirror", "shared"):
        leaves = [rows(1, 7, dtype, seed).requires_grad_() for seed in (1, 2)]
        loss = sk.fused_svr_loss(*leaves, radius, bilateral=bilateral, backend=backend)
        loss.backward()
        assert loss.item() == 0.0
        assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@pytest.mark.parametrize("renormalize", [False, True])
def test_one_pair_of_siglip(renormalize):
    """softplus(-(k s + b)) for the base and both support vectors."""
    a, t = rows(1, 7, torch.float64, 1), rows(1, 7, torch.float64, 2)
    options = {"objective": "siglip", "renormalize": renormalize}
    loss = sk.fused_svr_loss(a, t, 0.1, 5.0, -2.0, **options)
    r = (a - t).norm()
    u = (a - t) / r
    supports = [t + 0.1 * u, a - 0.1 * u]
    if renormalize:
        supports = [x / x.norm() for x in supports]
    pairs = [(t, a), *zip(supports, (a, t), strict=True)]
    wanted = sum(F.softplus(-(5.0 * (x * y).sum() - 2.0)) for x, y in pairs)
    assert close(loss, wanted, 1e-7)  # the smoothing of r


def test_siglip_without_bias_is_bias_zero():
    for backend in ("cpu", "reference"):
        options = {"objective": "siglip", "backend": backend}
        plain = sk.fused_svr_loss(A, T, 0.1, 7.0, **options)
        assert torch.equal(plain, sk.fused_svr_loss(A, T, 0.1, 7.0, 0.0, **options))
        assert not torch.equal(plain, sk.fused_svr_loss(A, T, 0.1, 7.0, -0.5, **options))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_float_scalar_and_rows_of_radius_agree(backend, dtype):
    audio, text = rows(37, 16, dtype, 1), rows(37, 16, dtype, 2)
    number = torch.float64 if dtype == torch.float64 else torch.float32
    radii = [0.25, torch.tensor(0.25), torch.full((37,), 0.25, dtype=number)]
    radii.append(torch.tensor(0.25, dtype=number).expand(37))
    losses = [sk.fused_svr_loss(audio, text, R, beta=0.1, backend=backend) for R in radii]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    ones = [sk.fused_svr_loss(audio, text, R, backend=backend) for R in (1, 1.0)]
    assert torch.equal(*ones) and not torch.equal(ones[0], losses[0])


def test_the_gradient_of_a_scalar_radius_is_the_sum_of_the_rows():
    audio, text = rows(37, 16, torch.float64, 1), rows(37, 16, torch.float64, 2)
    scalar = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    row = torch.full((37,), 0.25, dtype=torch.float64, requires_grad=True)
    for radius in (scalar, row):
        sk.fused_svr_loss(audio, text, radius).backward()
    assert scalar.grad.shape == () and row.grad.shape == (37,)
    assert close(scalar.grad, row.grad.sum(), 1e-14)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("other", FLOATS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dtypes(dtype, other, backend):
    """The loss in the accumulator's dtype, each gradient in its input's own."""
    leaves = [rows(37, 16, dtype, seed).requires_grad_() for seed in (1, 2)]
    leaves.append(torch.full((37,), 0.25, dtype=other, requires_grad=True))
    leaves += [torch.tensor(x, dtype=other, requires_grad=True) for x in (8.0, -3.0)]
    weight = torch.full((37,), 0.5, dtype=other)
    options: dict[str, Any] = {"objective": "siglip", "backend": backend, "return_stats": True}
    loss, stats = sk.fused_svr_loss(*leaves, weight=weight, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide and all(value.dtype == wide for value in stats)
    loss.backward()
    for leaf in leaves:
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
        assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0


def test_mixed_dtypes_give_the_right_gradients():
    """Values that every dtype holds exactly: only the gradients' rounding differs."""
    gradients = []
    for other in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        leaves = [rows(37, 16, torch.float32, seed).requires_grad_() for seed in (1, 2)]
        leaves.append(torch.full((37,), 0.25, dtype=other, requires_grad=True))
        leaves.append(torch.tensor(8.0, dtype=other, requires_grad=True))
        sk.fused_svr_loss(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
        for gradient, wanted in zip(gradients[-1], gradients[0], strict=True):
            # dk is summed in float64, so it is rounded once, from there.
            assert close(gradient, wanted, torch.finfo(gradient.dtype).eps + 1e-7)


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bilateral", ["none", "mirror", "shared"])
def test_ids_that_all_differ_change_nothing(objective, backend, bilateral):
    audio, text = rows(130, 16, seed=1), rows(130, 16, seed=2)
    options = {"objective": objective, "backend": backend, "bilateral": bilateral}
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for ids in (None, torch.randperm(130, generator=generator) * 2**40 - 2**45):
        leaves = [x.clone().requires_grad_() for x in (audio, text)]
        loss = sk.fused_svr_loss(*leaves, 0.1, ids=ids, **options)
        outputs.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*outputs, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bilateral", ["none", "mirror", "shared"])
def test_one_id_for_all_leaves_no_negative(backend, bilateral):
    leaves = [rows(130, 16, seed=seed).requires_grad_() for seed in (1, 2)]
    ids = torch.full((130,), 7)
    loss = sk.fused_svr_loss(*leaves, 0.1, ids=ids, bilateral=bilateral, backend=backend)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_equal_ids_count():
    """A pair of rows with one id is as if its logits were not there, and ids use all 64 bits."""
    ids = torch.tensor([0, 2**32, 2**33, 0, 5, -1])
    k, logits = 3.0, 3.0 * T.double() @ A.double().t()
    logits[0, 3] = logits[3, 0] = -math.inf
    labels = torch.arange(N)
    wanted = F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)
    loss = sk.fused_svr_loss(A.double(), T.double(), logit_scale=k, ids=ids)
    assert close(loss, wanted, 1e-14)


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reductions_are_sums_of_the_rows(objective, backend):
    audio, text = rows(37, 16, torch.float64, 1), rows(37, 16, torch.float64, 2)
    weight = torch.linspace(0.0, 2.0, 37, dtype=torch.float64)
    options = {"objective": objective, "backend": backend, "weight": weight, "beta": 0.1}
    none, total, mean = (
        sk.fused_svr_loss(audio, text, 0.1, reduction=reduction, **options)
        for reduction in ("none", "sum", "mean")
    )
    assert none.shape == (37,) and none[0] == 0.0
    assert close(none.sum(), total, 1e-14) and close(mean * 37, total, 1e-14)


def test_zero_weight_is_a_row_without_terms_but_with_negatives():
    weight = torch.ones(N, dtype=torch.float64)
    weight[2] = 0.0
    a, t = A.double(), T.double()
    whole = sk.fused_svr_loss(a, t, 0.1, reduction="none")
    part = sk.fused_svr_loss(a, t, 0.1, reduction="none", weight=weight)
    assert torch.equal(part, whole * weight)


def test_normalize_is_the_loss_of_normalised_rows():
    a, t = 3.0 * A.double(), 0.2 * T.double()
    loss = sk.fused_svr_loss(a, t, 0.1, normalize=True)
    assert close(loss, sk.fused_svr_loss(F.normalize(a, dim=1), F.normalize(t, dim=1), 0.1), 1e-14)
    assert not close(loss, sk.fused_svr_loss(a, t, 0.1), 1e-3)


@pytest.mark.parametrize(
    "number", [14, 14.0, torch.tensor(14.0), torch.nn.Parameter(torch.tensor(14.0))]
)
def test_numbers_and_tensors_of_scale_agree(number):
    loss = sk.fused_svr_loss(A, T, 0.1, number)
    assert torch.equal(loss.detach(), sk.fused_svr_loss(A, T, 0.1, 14.0))


def test_exchange_changes_nothing_on_one_rank():
    gather, ring = (sk.fused_svr_loss(A, T, 0.1, exchange=name) for name in ("gather", "ring"))
    assert torch.equal(gather, ring)


def test_return_stats_changes_neither_loss_nor_gradient():
    for alpha in (0.0, 1.0):
        outputs = []
        for stats in (False, True):
            leaves = [rows(37, 16, seed=seed).requires_grad_() for seed in (1, 2)]
            found = sk.fused_svr_loss(*leaves, 0.1, alpha=alpha, return_stats=stats)
            loss = found[0] if stats else found
            assert isinstance(loss, Tensor)
            assert not stats or isinstance(found[1], sk.SVRStats)
            outputs.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        values = zip(*outputs, strict=True)
        if alpha:
            assert all(torch.equal(x, y) for x, y in values)
        else:  # the support vectors are computed for the statistics only
            assert all(close(x, y, 1e-6) for x, y in values)


def test_the_loss_passes_the_rule():
    """One case under the acceptance rule, so that the facts above are facts about the loss."""
    check(sk.fused_svr_loss, Case(N=65, D=24, radius="row", weighted=True, duplicates=True))
