"""cached_step: the gradients of the whole batch, from chunks."""

from collections import UserDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import supclap_kernels as sk

N = 26


class Tower(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 16)
        )

    def forward(self, x: Tensor, *, offset: Tensor | None = None) -> Tensor:
        out = self.layers(x if offset is None else x + offset)
        return nn.functional.normalize(out, dim=1)


def setting(dropout: float = 0.0) -> tuple[list[Tower], list[Tensor], nn.Module, nn.Parameter]:
    torch.manual_seed(0)
    towers = [Tower(12, dropout), Tower(10, dropout)]
    batch = [torch.randn(N, 12), torch.randn(N, 10)]
    return towers, batch, sk.SVRLoss(sk.StaticRadius(0.2)), nn.Parameter(torch.tensor(12.0))


def gradients(*modules: nn.Module, scale: nn.Parameter) -> list[Tensor]:
    every = [p for module in modules for p in module.parameters()] + [scale]
    return [p.grad.clone() for p in every if p.grad is not None]


def close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    pairs = list(zip(found, wanted, strict=True))
    return all(float((x - y).abs().max()) <= 3e-6 * float(y.abs().max()) for x, y in pairs)


@pytest.mark.parametrize("size", [1, 5, 26, 100, (7, 26)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_the_whole_batch(size, dropout):
    """With dropout: of the same chunks with one graph and the same masks."""
    towers, batch, criterion, scale = setting(dropout)
    loss = lambda audio, text: criterion(audio, text, scale)  # noqa: E731
    torch.manual_seed(1)
    value = sk.cached_step(towers, batch, loss, size)
    after = torch.get_rng_state()
    found = gradients(*towers, criterion, scale=scale)
    for module in (*towers, criterion):
        module.zero_grad()
    scale.grad = None
    torch.manual_seed(1)
    sizes = (size, size) if isinstance(size, int) else size
    rows = [
        torch.cat([tower(x) for x in given.split(n)])
        for tower, given, n in zip(towers, batch, sizes, strict=True)
    ]
    whole = loss(*rows)
    whole.backward()
    assert not value.requires_grad and torch.equal(value, whole.detach())
    assert close(found, gradients(*towers, criterion, scale=scale))
    assert torch.equal(after, torch.get_rng_state())  # the next step's numbers are new ones


def test_scaler():
    """Gradients are scaled once, the returned loss is not."""
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=65536.0)):
        towers, batch, criterion, scale = setting()
        loss = lambda audio, text: criterion(audio, text, scale)  # noqa: B023, E731
        value = sk.cached_step(towers, batch, loss, 8, scaler)
        factor = 1.0 if scaler is None else 65536.0
        found = gradients(*towers, criterion, scale=scale)
        results.append((float(value), [x / factor for x in found]))
    assert results[0][0] == results[1][0] and close(results[1][1], results[0][1])


def test_arguments_of_encoders():
    """Tuples and dicts; what is no tensor passes."""
    towers, batch, criterion, scale = setting()
    loss = lambda audio, text: criterion(audio, text, scale)  # noqa: E731
    sk.cached_step(towers, batch, loss, 8)
    found = gradients(*towers, criterion, scale=scale)
    for module in (*towers, criterion):
        module.zero_grad()
    scale.grad = None
    given: list[Any] = [(batch[0],), {"x": batch[1], "offset": None}]
    sk.cached_step(towers, given, loss, 8)
    assert close(gradients(*towers, criterion, scale=scale), found)


def test_a_frozen_encoder_is_encoded_once():
    towers, batch, criterion, scale = setting()
    towers[1].requires_grad_(False)
    calls = []
    towers[1].register_forward_hook(lambda *_: calls.append(1))
    sk.cached_step(towers, batch, lambda a, t: criterion(a, t, scale), 13)
    assert len(calls) == 2 and all(p.grad is None for p in towers[1].parameters())


def test_a_frozen_encoder_leaves_its_random_numbers():
    """After the step the generator is where the encoders' first pass left it."""
    towers, batch, criterion, scale = setting(dropout=0.3)
    towers[1].requires_grad_(False)
    torch.manual_seed(1)
    sk.cached_step(towers, batch, lambda a, t: criterion(a, t, scale), 7)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for tower, given in zip(towers, batch, strict=True):
        for part in given.split(7):
            tower(part)
    assert torch.equal(after, torch.get_rng_state())


def test_the_first_pass_has_no_graph():
    towers, batch, criterion, scale = setting()
    recorded: list[bool] = []
    towers[0].register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    sk.cached_step(towers, batch, lambda a, t: criterion(a, t, scale), 13)
    assert recorded == [False, False, True, True]


def test_gradcache_contract():
    """Its `loss_fn` is called with detached leaves, and `backward` leaves their gradients."""
    towers, batch, criterion, scale = setting()
    loss_fn: Callable[..., Tensor] = lambda *reps: criterion(*reps, scale)  # noqa: E731
    reps = [tower(x).detach().requires_grad_() for tower, x in zip(towers, batch, strict=True)]
    loss_fn(*reps).backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in reps)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": (3,)}, "2 encoders, 2 inputs, 1 chunk sizes"),
        ({"batch": [torch.ones(4, 12), (torch.ones(4, 10), torch.ones(5))]}, "one length"),
    ],
)
def test_what_does_not_fit(changed, words):
    towers, batch, criterion, scale = setting()
    given = {"batch": batch, "chunk_size": 8, **changed}
    with pytest.raises(ValueError, match=words):
        sk.cached_step(towers, loss=lambda a, t: criterion(a, t, scale), **given)


class Output(dict):
    """A ModelOutput: a dict with attributes."""

    @property
    def embeds(self) -> Tensor:
        found: Tensor = self["embeds"]
        return found


class Nested(Tower):
    """Takes its rows inside something, and returns them inside an Output."""

    def forward(self, *given: Any, **named: Any) -> Any:
        values = [*given, *named.values()]
        while not isinstance(values[0], Tensor):
            first = values[0]
            values = [*first.values()] if isinstance(first, Mapping) else [*first]
        return Output(embeds=super().forward(values[0]))


class Pair(NamedTuple):
    rows: Tensor
    name: str


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: UserDict(input_ids=x, extra=None),
        lambda x: MappingProxyType({"input_ids": x}),
        lambda x: ({"input_ids": x, "more": [x, "words"]},),
        lambda x: {"inputs": UserDict(input_ids=x)},
        lambda x: [[x, x]],
        lambda x: {"inputs": Pair(x, "a"), "step": torch.tensor(3)},
        lambda x: x,
    ],
    ids=["mapping", "read only", "tuple of dict", "nested", "lists", "named tuple", "tensor"],
)
@pytest.mark.parametrize("several", [False, True])
def test_inputs_and_outputs_inside_others(wrap, several):
    towers, batch, criterion, scale = setting(dropout=0.3)
    loss = lambda audio, text: criterion(audio, text, scale)  # noqa: E731
    torch.manual_seed(1)
    value = sk.cached_step(towers, batch, loss, 8)
    wanted = gradients(*towers, criterion, scale=scale)
    nested = [Nested(12, 0.3), Nested(10, 0.3)]
    for new, old in zip(nested, towers, strict=True):
        new.load_state_dict(old.state_dict())
    scale.grad = None
    criterion.zero_grad()
    get_rep: Any = lambda output: output.embeds  # noqa: E731
    get_rep = [get_rep, lambda output: output["embeds"]] if several else get_rep
    torch.manual_seed(1)
    found = sk.cached_step(nested, [wrap(x) for x in batch], loss, 8, get_rep=get_rep)
    assert torch.equal(found, value)
    assert all(map(torch.equal, gradients(*nested, criterion, scale=scale), wanted))


def test_a_tokenizers_batch():
    tokens = pytest.importorskip("transformers").BatchEncoding
    towers, batch, criterion, scale = setting()
    loss = lambda audio, text: criterion(audio, text, scale)  # noqa: E731
    value = sk.cached_step(towers, batch, loss, 8)
    assert torch.equal(sk.cached_step(towers, [tokens({"x": x}) for x in batch], loss, 8), value)


def test_an_encoder_that_returns_no_tensor():
    towers, batch, criterion, scale = setting()
    nested = [towers[0], Nested(10, 0.0)]
    with pytest.raises(TypeError, match="encoder 1 .* returned Output, .* get_rep=lambda output"):
        sk.cached_step(nested, batch, lambda a, t: criterion(a, t, scale), 8)
    with pytest.raises(TypeError, match="get_rep .* encoder 0 .* returned str"):
        sk.cached_step(towers, batch, lambda a, t: a.sum(), 8, get_rep=lambda output: "rows")
    with pytest.raises(ValueError, match="2 encoders, 1 get_rep"):
        sk.cached_step(towers, batch, lambda a, t: a.sum(), 8, get_rep=[None])
    with pytest.raises(ValueError, match="input 0 holds no tensors"):
        sk.cached_step(towers, [{"x": "words"}, batch[1]], lambda a, t: a.sum(), 8)
