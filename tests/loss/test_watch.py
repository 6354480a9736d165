"""The warning of a radius that is never trained: when it comes, and when it must not."""

import copy
import pickle
import timeit
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import supclap_kernels as sk
from supclap_kernels import watch as watch_module
from supclap_kernels.watch import PATIENCE, watches

MESSAGE = "never changed.*attach_radius"


def embeddings(N: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    audio, text = (torch.randn(N, 5, generator=generator) for _ in range(2))
    return audio.requires_grad_(), text.requires_grad_()


def radii() -> dict[str, Callable[[], nn.Module]]:
    return {
        "static": sk.StaticRadius,
        "similarities": lambda: sk.DynamicRadius(6, hidden=(4, 4)),
        "summary": lambda: sk.DynamicRadius(features="summary", hidden=(4, 4)),
    }


every_radius = pytest.mark.parametrize("make", radii().values(), ids=radii())


def warned(loss: Callable[..., Any], steps: int, after: Callable[[], Any] = lambda: None) -> int:
    """How often `steps` training steps warn."""
    audio, text = embeddings()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            loss(audio, text, logit_scale=9.0, normalize=True).backward()
            after()
    return sum("never changed" in str(warning.message) for warning in caught)


def loss_of(radius: nn.Module) -> Callable[..., Tensor]:
    module = sk.SVRLoss(radius, normalize=True)
    return lambda audio, text, logit_scale, normalize: module(audio, text, logit_scale)


@every_radius
def test_a_radius_in_no_optimizer_is_warned_of_once(make):
    radius = make()
    loss = loss_of(radius)
    assert warned(loss, PATIENCE) == 0
    with pytest.warns(UserWarning, match=MESSAGE):
        loss(*embeddings(), 9.0, True)
    assert warned(loss, 2 * PATIENCE) == 0
    # Another one, of another loss, is warned of as well; and a plain parameter.
    assert warned(loss_of(make()), PATIENCE + 1) == 1


def test_a_plain_parameter_is_watched_too():
    R = nn.Parameter(torch.tensor(0.1))

    def loss(audio: Tensor, text: Tensor, **options: Any) -> Tensor:
        return sk.fused_svr_loss(audio, text, R, **options)

    assert warned(loss, PATIENCE) == 0 and warned(loss, PATIENCE + 1) == 1


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=1e-3, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


@every_radius
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_trained_radius_is_not(make, name):
    radius = make()
    optimizer = OPTIMIZERS[name](radius.parameters())
    assert warned(loss_of(radius), 2 * PATIENCE + 2, optimizer.step) == 0


@every_radius
def test_accumulation_and_writes_to_data(make):
    radius = make()
    optimizer = torch.optim.SGD(radius.parameters(), lr=1e-3, fused=True)
    count = [0]

    def every_eighth() -> None:
        count[0] += 1
        if count[0] % 8 == 0:
            optimizer.step()
            optimizer.zero_grad()

    assert warned(loss_of(radius), PATIENCE + 2, every_eighth) == 0
    radius = make()

    def by_hand() -> None:
        for p in radius.parameters():
            p.data.sub_(1e-3 * p.grad)

    assert warned(loss_of(radius), PATIENCE + 2, by_hand) == 0


@every_radius
def test_frozen_evaluated_and_without_gradients(make):
    frozen = make().requires_grad_(False)
    assert warned(loss_of(frozen), PATIENCE + 2) == 0
    assert warned(loss_of(make().eval()), PATIENCE + 2) == 0
    radius = make()
    loss, rows = loss_of(radius), embeddings()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for _ in range(PATIENCE + 2):
            loss(*rows, 9.0, True)
    assert not any(id(p) in watches for p in radius.parameters())
    # Frozen for a while and then trained: counted from there on.
    frozen.requires_grad_(True)
    assert warned(loss_of(frozen), PATIENCE) == 0


def test_silent_where_it_is_traced():
    radius = sk.StaticRadius()
    module = sk.SVRLoss(radius, normalize=True)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    rows = embeddings()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(PATIENCE + 2):
            compiled(*rows, 9.0)
    assert id(radius.radius) not in watches


@every_radius
def test_copies_are_counted_for_themselves(make):
    radius = make()
    assert warned(loss_of(radius), PATIENCE - 10) == 0
    copies = copy.deepcopy(radius), pickle.loads(pickle.dumps(radius))
    for other in copies:
        assert warned(loss_of(other), PATIENCE) == 0
        assert warned(loss_of(other), 1) == 1
    assert radius.state_dict().keys() == copies[0].state_dict().keys()


def test_nothing_is_kept_of_a_radius_that_is_gone():
    before = len(watches)
    warned(loss_of(sk.StaticRadius()), 3)
    assert len(watches) == before


def test_values_are_compared_once(monkeypatch):
    """Reading a device's value waits for it: at the end of the count alone."""
    calls = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda x, y: calls.append(1) or equal(x, y))
    radius = sk.StaticRadius()
    optimizer = torch.optim.SGD(radius.parameters(), lr=1e-3, fused=True)
    assert warned(loss_of(radius), PATIENCE, optimizer.step) == 0 and not calls
    assert warned(loss_of(radius), PATIENCE, optimizer.step) == 0 and len(calls) == 1
    # Not even then where the optimizer's writes are counted on the host.
    radius = sk.StaticRadius()
    optimizer = torch.optim.SGD(radius.parameters(), lr=1e-3)
    assert warned(loss_of(radius), 2 * PATIENCE, optimizer.step) == 0 and len(calls) == 1


def test_a_step_costs_little():
    parameter = nn.Parameter(torch.tensor(0.1))
    for settled in (False, True):
        watch_module.watch(parameter)
        watches[id(parameter)].settled = settled
        watches[id(parameter)].steps = -(10**9)
        seconds = min(timeit.repeat(lambda: watch_module.watch(parameter), number=1000, repeat=9))
        assert seconds / 1000 < 5e-6, "a step's share is under a microsecond on a free machine"
