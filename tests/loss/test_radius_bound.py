"""A radius that stays within the gap: R_i = r_i sigmoid(x_i)."""

import math

import pytest
import torch
from interface_cases import close
from torch.nn.functional import normalize

import supclap_kernels as sk
from supclap_kernels.reference import EPS

N, D = 12, 16
KINDS = {
    "static": lambda **options: sk.StaticRadius(**options),
    "dynamic": lambda **options: sk.DynamicRadius(features="summary", **options),
}


def rows(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(N, D, generator=generator) for _ in range(2))
    audio, text = (normalize(x, dim=1).to(dtype).requires_grad_() for x in made)
    return audio, text


def gap(audio: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return ((audio - text).square().sum(dim=1) + EPS**2).sqrt().detach()


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_a_share_of_the_gap_and_never_exceeds_it(kind):
    audio, text = rows()
    module = KINDS[kind](init=0.3, bound="gap")
    R = module(audio, text, 14.0)
    assert close(R, 0.3 * gap(audio, text), 1e-5)
    assert "bound='gap'" in repr(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1e3 if kind == "static" else 3 * torch.randn_like(p))
    R = module(audio, text, 14.0)
    assert R.isfinite().all() and (R >= 0).all() and (R <= gap(audio, text)).all()
    module.reset_parameters()
    assert close(module(audio, text, 14.0), 0.3 * gap(audio, text), 1e-5)


def test_the_gap_is_a_constant():
    """No gradient through it: the push keeps the contraction that the paper derives."""
    audio, text = rows()
    static = sk.StaticRadius(init=0.3, bound="gap")
    static(audio, text, 14.0).sum().backward()
    assert audio.grad is None and text.grad is None
    assert close(static.radius.grad, (0.21 * gap(audio, text)).sum()[None], 1e-5)
    dynamic = sk.DynamicRadius(features="summary", detach_similarity=True, bound="gap")
    dynamic(audio, text, 14.0).sum().backward()
    assert audio.grad is None and text.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_with_it(kind, dtype):
    """Rows that the loss normalises are normalised for the gap, too; no constraint is violated."""
    audio, text = rows(dtype)
    module = KINDS[kind](init=0.6, bound="gap")
    loss, stats = sk.SVRLoss(module, normalize=True, beta=1.0, return_stats=True)(
        3 * audio, 5 * text, 14.0
    )
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert math.isclose(stats.contraction, 0.4, rel_tol=tolerance) and stats.l_cons == 0
    unbounded = 0.6 * gap(*(normalize(x.float(), dim=1) for x in (audio, text)))
    same = sk.fused_svr_loss(
        3 * audio, 5 * text, unbounded.to(dtype).detach(), 14.0, normalize=True
    )
    assert close(loss.to(same.dtype), same, tolerance)


def test_what_a_bound_refuses():
    for init in (0.0, 1.0, -0.1, 1.5, math.nan):
        for make in KINDS.values():
            with pytest.raises(ValueError, match="init is R / r and lies between 0 and 1"):
                make(init=init, bound="gap")
    for make in KINDS.values():
        with pytest.raises(ValueError, match="bound must be one of"):
            make(bound="pair")


def test_checkpoints_and_compiled_calls():
    audio, text = rows()
    trained = sk.StaticRadius(init=0.2, bound="gap")
    fresh = sk.StaticRadius(init=0.7, bound="gap")
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(audio, text, 14.0), trained(audio, text, 14.0))
    criterion = sk.SVRLoss(trained)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    assert close(compiled(audio, text, 14.0), criterion(audio, text, 14.0), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_kind_is_taken_for_the_other(kind):
    """Their numbers mean different things."""
    bounded, free = KINDS[kind](init=0.3, bound="gap"), KINDS[kind](init=0.3)
    for first, second in ((bounded, free), (free, bounded)):
        with pytest.raises(RuntimeError, match="bounded"):
            first.load_state_dict(second.state_dict())
        model = torch.nn.Linear(2, 2)
        sk.attach_radius(model, first)
        with pytest.raises(ValueError, match="another radius hangs on this model"):
            sk.attach_radius(model, second)
