"""The short way of ordinary calls: the same bits as the long way, and no other calls."""

import gc
import threading
import warnings
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from allocations import traced
from direct_cases import compare, compare_frozen, every_option, long_way, watch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import supclap_kernels as sk
from supclap_kernels import native
from supclap_kernels.backends.cpu.call import native_problem
from supclap_kernels.backends.state import STATE_ROWS
from supclap_kernels.options import Options
from supclap_kernels.testing import DIFFERENTIABLE, Case, make_inputs

N, D = 24, 32


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """For each call of the loss, whether it went the short way."""
    return watch(monkeypatch)


def rows(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = make_inputs(Case(N=N, D=D, **options))
    return inputs.audio.requires_grad_(), inputs.text.requires_grad_()


# --------------------------------------------------------------------------------- what it computes


@every_option(
    60,
    dtype=(torch.float32, torch.float64),
    N=(1, 2, 23, 64, 65, 256),
    D=(1, 3, 48, 130),
)
def test_the_same_bits_as_the_long_way(chosen, taken, monkeypatch, poisoned_memory):
    compare(chosen, sk.fused_svr_loss, taken, monkeypatch)


@pytest.mark.parametrize("frozen", DIFFERENTIABLE)
def test_what_is_frozen_gets_no_gradient(frozen, taken, monkeypatch):
    compare_frozen(frozen, sk.fused_svr_loss, taken, monkeypatch)


@pytest.mark.parametrize(
    "numbers", [{"radius": 0.1}, {"logit_scale": 14.0}, {"radius": 0.1, "logit_scale": 3.0}]
)
def test_python_numbers(numbers, taken, monkeypatch):
    for dtype in (torch.float32, torch.float64):
        audio, text = rows(dtype=dtype)
        losses = [sk.fused_svr_loss(audio, text, **numbers)]
        with monkeypatch.context() as patch:
            long_way(patch)
            losses.append(sk.fused_svr_loss(audio, text, **numbers))
        assert torch.equal(*losses)
        assert torch.equal(*(torch.autograd.grad(loss, audio)[0] for loss in losses))
    assert taken == [True, True]


def test_backward_again_and_other_upstream_gradients(taken, monkeypatch):
    """The first backward gives the gradients away; what its caller does to them is his own."""
    inputs = make_inputs(Case(N=N, D=D, radius="scalar", weighted=True, duplicates=True))
    leaves = list(inputs.differentiable().values())
    for x in leaves:
        x.requires_grad_()
    options = {"ids": inputs.ids, "weight": inputs.weight, "bilateral": "none"}
    loss = sk.fused_svr_loss(**inputs.differentiable(), **options)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.mul_(7)
    second = torch.autograd.grad(loss, leaves, torch.tensor(4.0), retain_graph=True)
    third = torch.autograd.grad(loss, leaves, torch.tensor(0.3))
    assert all(torch.equal(4 * x, y) for x, y in zip(kept, second, strict=True))
    long_way(monkeypatch)
    again = sk.fused_svr_loss(**inputs.differentiable(), **options)
    wanted = torch.autograd.grad(again, leaves, torch.tensor(0.3))
    assert all(torch.equal(x, y) for x, y in zip(third, wanted, strict=True))
    assert taken == [True]
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_hooks_on_saved_tensors_take_the_long_way(taken):
    """They may move or drop what forward leaves, of which a direct call saves a part."""
    audio, text = rows()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        sk.fused_svr_loss(audio, text, 0.1).backward()
        sk.fused_svr_loss(audio.detach(), text.detach())  # which saves nothing
    assert taken == [False, True]


def test_several_threads_go_backward_at_once(taken):
    audio, text = (torch.randn(256, 256, requires_grad=True) for _ in range(2))
    loss = sk.fused_svr_loss(audio, text, 0.1)
    wanted = torch.autograd.grad(loss, (audio, text), retain_graph=True)
    wrong = []

    def go() -> None:
        for _ in range(20):
            found = torch.autograd.grad(loss, (audio, text), retain_graph=True)
            if not all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True)):
                wrong.append(found)

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and taken == [True]


def test_inputs_changed_before_backward_are_an_error(taken):
    audio, text = rows()
    doubled = audio * 2
    loss = sk.fused_svr_loss(doubled, text)
    doubled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert taken == [True]


def test_a_second_derivative_is_an_error(taken):
    audio, text = rows()
    (gradient,) = torch.autograd.grad(sk.fused_svr_loss(audio, text), audio, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.sum().backward()
    assert taken == [True]


# ----------------------------------------------------------------------------- what is not ordinary


def unusual() -> dict[str, Any]:
    """Calls that the long way takes, each as (arguments, options)."""
    audio, text = rows()
    z = torch.zeros
    half = audio.detach().bfloat16()
    wide = audio.detach().double()
    return {
        "16 bits": ((half, half), {}),
        "not contiguous": ((audio.t().contiguous().t(), text), {}),
        "large": ((torch.randn(257, 8), torch.randn(257, 8)), {}),
        "negated": ((torch._neg_view(audio.detach()), text), {}),
        "zeros without memory": ((torch._efficientzerotensor((N, D)), text), {}),
        "another tensor class": (
            (audio.detach().as_subclass(type("Own", (torch.Tensor,), {})), text),
            {},
        ),
        "statistics": ((audio, text), {"return_stats": True}),
        "per row": ((audio, text), {"reduction": "none"}),
        "another backend": ((audio, text), {"backend": "reference"}),
        "panels": ((audio, text), {"backend": "cpu:panel"}),
        "an int": ((audio, text, 1), {}),
        "a scale in float64": ((audio, text, None, z((), dtype=torch.float64) + 5), {}),
        "a weight in float64": ((audio, text), {"weight": z(N, dtype=torch.float64) + 1}),
        "a radius in float32": ((wide, wide, z(()) + 0.1), {}),
        "a column of weights": ((audio, text), {"weight": torch.ones(N, 2)[:, 0]}),
        "a parameter as radius": ((audio, text, nn.Parameter(z(()) + 0.1)), {}),
        "alpha of numpy": ((audio, text), {"alpha": __import__("numpy").float64(0.5)}),
    }


@pytest.mark.parametrize("name", unusual())
def test_calls_that_are_not_ordinary(name, taken, monkeypatch):
    arguments, options = unusual()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of radii that nobody trains
        found = sk.fused_svr_loss(*arguments, **options)
        long_way(monkeypatch)
        wanted = sk.fused_svr_loss(*arguments, **options)
    assert taken == [name == "alpha of numpy"]
    pairs = (
        zip((found,), (wanted,), strict=True) if torch.is_tensor(found) else [(found[0], wanted[0])]
    )
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    "arguments, options, error",
    [
        (lambda a, t: (a, t[:-1]), {}, "same shape"),
        (lambda a, t: (a[0], t[0]), {}, r"must have shape \(N, D\)"),
        (lambda a, t: (a[:0], t[:0]), {}, "are empty"),
        (lambda a, t: (a, t.double()), {}, "same dtype"),
        (lambda a, t: (a.long(), t.long()), {}, "must be float32"),
        (lambda a, t: (a, None), {}, "text must be a tensor"),
        (lambda a, t: (a, t, torch.ones(N + 1)), {}, "radius must be a number"),
        (lambda a, t: (a, t, torch.ones(N, 1)), {}, "radius must be a number"),
        (lambda a, t: (a, t, None, torch.ones(1)), {}, "logit_scale must be a number"),
        (lambda a, t: (a, t, None, None), {}, "logit_scale must be a number"),
        (lambda a, t: (a, t, None, 1.0, 0.0), {}, "logit_bias belongs to objective='siglip'"),
        (lambda a, t: (a, t), {"ids": torch.ones(N)}, "ids must be torch.int64"),
        (lambda a, t: (a, t), {"ids": torch.ones(N + 1).long()}, "ids must have shape"),
        (lambda a, t: (a, t), {"weight": torch.ones(N - 1)}, "weight must have shape"),
        (lambda a, t: (a, t), {"weight": 2.0}, "weight must be a tensor"),
        (lambda a, t: (a, t), {"alpha": "1"}, "alpha must be a Python number"),
        (lambda a, t: (a, t), {"alpha": [1.0]}, "alpha must be a Python number"),
        (lambda a, t: (a, t), {"backend": "tpu"}, "backend must be one of"),
        (lambda a, t: (a, t), {"exchange": "post"}, "exchange must be one of"),
        (lambda a, t: (a, t.to("meta")), {}, "same device"),
    ],
)
def test_errors_are_those_of_the_long_way(arguments, options, error):
    audio, text = (x.detach() for x in rows())
    with pytest.raises((TypeError, ValueError), match=error):
        sk.fused_svr_loss(*arguments(audio, text), **options)


def test_debugging_sees_every_call(taken, monkeypatch):
    monkeypatch.setenv("SUPCLAP_DEBUG", "1")
    audio, text = rows()
    with pytest.raises(ValueError, match="SUPCLAP_DEBUG"):
        sk.fused_svr_loss(audio * float("nan"), text)
    monkeypatch.delenv("SUPCLAP_DEBUG")
    with pytest.raises(RuntimeError, match="without overflow"):  # in float32
        sk.fused_svr_loss(audio, text, None, 1e300)
    sk.fused_svr_loss(audio, text)
    assert taken == [False, False, True]


# --------------------------------------------------------------------------- who looks at operators


def test_a_mode_sees_the_operators(taken):
    audio, text = rows()
    with FlopCounterMode(display=False):
        sk.fused_svr_loss(audio, text)
    assert taken == [False]
    loss = sk.fused_svr_loss(audio, text)  # ordinary, but its backward is not
    wanted = torch.autograd.grad(loss, (audio, text), retain_graph=True)
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), named=None):
            seen.append(str(operation))
            return operation(*arguments, **(named or {}))

    with Recorder():
        found = torch.autograd.grad(loss, (audio, text))
    assert "supclap_kernels.svr_loss_backward.default" in seen
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_backward_by_the_operators_with_numbers(taken, monkeypatch):
    """All kinds of arguments, where backward alone is watched."""
    case = Case(N=N, D=D, radius="none", weighted=True, duplicates=True,
                options={"objective": "siglip", "bilateral": "none"})  # fmt: skip
    inputs = replace(make_inputs(case), logit_bias=torch.tensor(-8.0, requires_grad=True))
    leaves = [inputs.audio.requires_grad_(), inputs.text.requires_grad_(), inputs.logit_bias]
    loss = sk.fused_svr_loss(*leaves[:2], 0.2, 9.0, leaves[2], ids=inputs.ids,
                             weight=inputs.weight, **case.options)  # fmt: skip
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = torch.autograd.grad(loss, leaves)
    assert taken == [True]
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_transforms_and_tangents_go_the_long_way(taken):
    audio, text = (x.detach() for x in rows())
    scaled = torch.func.vmap(lambda x: x * sk.fused_svr_loss(audio, text))
    assert scaled(torch.ones(2)).shape == (2,)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(audio, torch.ones_like(audio))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            sk.fused_svr_loss(dual, text)
    assert taken == [False, False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, taken):
    audio, text = rows()
    plain = torch.autograd.grad(sk.fused_svr_loss(2 * audio, text), audio)[0]
    loss = checkpoint(lambda a: sk.fused_svr_loss(2 * a, text), audio, use_reentrant=reentrant)
    loss.backward()
    assert torch.equal(audio.grad, plain) and taken[0]


def test_inference_mode_and_no_grad(taken):
    audio, text = rows()
    wanted = sk.fused_svr_loss(audio, text)
    with torch.no_grad():
        assert torch.equal(sk.fused_svr_loss(audio, text), wanted.detach())
    with torch.inference_mode():
        assert sk.fused_svr_loss(audio, text).is_inference()
    assert all(taken)


# ---------------------------------------------------------------------------- what it leaves behind


def test_nothing_lives_on(taken):
    """No reference cycle; the gradients die with the loss, the inputs with their owner."""
    audio, text = rows()
    weight = torch.ones(N)
    gc.collect()
    gc.disable()
    try:
        rows_of = weakref.ref(audio), weakref.ref(text), weakref.ref(weight)
        loss = sk.fused_svr_loss(audio, text, 0.1, weight=weight)
        node = weakref.ref(loss.grad_fn)
        del loss, audio, text, weight
        assert node() is None and [x() for x in rows_of] == [None] * 3
    finally:
        gc.enable()
    assert taken == [True]


def test_memory_is_no_more_than_estimated(taken):
    def step() -> Any:
        return torch.autograd.grad(sk.fused_svr_loss(audio, text, 0.1), (audio, text))

    audio, text = rows()
    step()
    trace, gradients = traced(step)
    beyond = trace.peak - sum(x.nbytes for x in gradients)
    problem = native_problem(N, D, torch.float32, 0, Options())
    scratch = native.module().small_bytes(problem, False) + 4 * (STATE_ROWS + 1) * N
    assert taken == [True, True]
    assert beyond < 64 and beyond + scratch <= 1.1 * sk.memory_estimate(N, D)


def test_the_module_goes_the_short_way(taken):
    audio, text = rows()
    loss = sk.SVRLoss(radius=sk.StaticRadius(0.1))
    loss(audio, text, nn.Parameter(torch.tensor(14.0))).backward()
    assert taken == [True] and all(x.grad is not None for x in loss.parameters())
