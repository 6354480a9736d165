"""The short way of the single launch: the same bits as the long way, by the same launches."""

from typing import Any

import pytest
import torch
from direct_cases import compare, compare_frozen, every_option, watch
from torch.utils.flop_counter import FlopCounterMode

import supclap_kernels as sk
from supclap_kernels import direct, native
from supclap_kernels.testing import DIFFERENTIABLE, Case, evaluate, make_inputs


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """For each call of the loss, whether it went the short way."""
    return watch(monkeypatch)


def fused(*arguments: Any, **options: Any) -> Any:
    return sk.fused_svr_loss(*arguments, backend="cuda", **options)


@every_option(
    45,
    dtype=(torch.float32, torch.bfloat16, torch.float16),
    N=(1, 2, 23, 65),
    D=(1, 16, 48, 100),
)
def test_the_same_bits_as_the_long_way(chosen, taken, monkeypatch, poisoned_memory):
    compare(chosen, fused, taken, monkeypatch)


@pytest.mark.parametrize("frozen", DIFFERENTIABLE)
def test_what_is_frozen_gets_no_gradient(frozen, taken, monkeypatch):
    compare_frozen(frozen, fused, taken, monkeypatch)


def test_backward_again_and_in_a_mode(taken):
    audio, text = (torch.randn(24, 32, requires_grad=True) for _ in range(2))
    scale = torch.tensor(5.0, requires_grad=True)
    leaves = (audio, text, scale)
    loss = fused(audio, text, torch.tensor(0.1), scale)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(4.0), retain_graph=True)
    assert all(torch.equal(4 * x, y) for x, y in zip(first, second, strict=True))
    with FlopCounterMode(display=False):
        third = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, third, strict=True)) and taken == [True]


def test_another_layout_of_the_same_values(taken):
    """Assigned to `data` between forward and backward, which reads the embeddings again."""
    audio, text = (torch.randn(24, 32, requires_grad=True) for _ in range(2))
    scale = torch.tensor(5.0, requires_grad=True)
    loss = fused(audio, text, torch.tensor(0.1), scale)
    wanted = torch.autograd.grad(loss, (audio, text, scale), retain_graph=True)
    text.data = text.data.t().contiguous().t()
    found = torch.autograd.grad(loss, (audio, text, scale))
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True)) and taken == [True]


def test_calls_that_are_not_ordinary(taken):
    audio, text = (torch.randn(24, 32) for _ in range(2))
    scale = torch.tensor(5.0)
    wanted = fused(audio, text, torch.tensor(0.1), scale)
    for arguments in (
        (audio, text, 0.1, scale),  # a number is sent to the device first
        (audio, text, torch.tensor(0.1), 5.0),
        (audio.t().contiguous().t(), text, torch.tensor(0.1), scale),
        (audio, text, torch.tensor(0.1, dtype=torch.float64), scale),
    ):
        assert torch.equal(fused(*arguments), wanted)
    fused(torch.randn(24, 32), text, None, scale, return_stats=True)
    assert taken == [True] + [False] * 5


def test_a_batch_that_does_not_fit(taken, monkeypatch):
    from supclap_kernels.backends.cuda import single

    monkeypatch.setattr(single, "limit", lambda *_: 23)
    direct.forget()
    audio, text = (torch.randn(24, 32) for _ in range(2))
    fused(audio, text, None, torch.tensor(5.0))
    fused(audio[:23], text[:23], None, torch.tensor(5.0))
    direct.forget()
    assert taken == [False, True]


@pytest.mark.parametrize("options", [{}, {"bilateral": "none"}, {"objective": "siglip"}], ids=str)
def test_a_graph_of_the_launches_computes_new_batches(options, monkeypatch):
    """What torch.cuda.make_graphed_callables asks for: a step is its launches and nothing else, and
    no number of the batch is a constant in one of them."""
    first, second = (
        make_inputs(Case(N=40, D=32, radius="scalar", seed=seed, scale=scale, options=options))
        for seed, scale in ((0, 14.0), (1, 9.0))
    )
    leaves = [x.requires_grad_() for x in first.differentiable().values()]
    alive = []  # a graph's memory is its own
    with monkeypatch.context() as patch:
        for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
            patch.setattr(owner, name, keeping(getattr(owner, name), alive))
        native.cuda().record(True)
        loss = fused(*leaves, **options)
        gradients = torch.autograd.grad(loss, leaves, first.upstream)
        native.cuda().record(False)
    with torch.no_grad():
        for x, other in zip(leaves, second.differentiable().values(), strict=True):
            x.copy_(other)
    native.cuda().replay()
    wanted = evaluate(fused, second, **options)
    found = dict(zip(wanted, (loss, *gradients), strict=True))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def keeping(function: Any, alive: list[Any]) -> Any:
    def kept(*arguments: Any, **named: Any) -> Any:
        made = function(*arguments, **named)
        alive.append(made)
        return made

    return kept
