"""The radius modules: what the network sees, where it starts, and what it keeps in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import supclap_kernels as sk
from supclap_kernels import radius as radius_module
from supclap_kernels.radius import TOP_NEGATIVES
from supclap_kernels.testing import Case, make_inputs

WIDTH = TOP_NEGATIVES + 4


class Recorder(nn.Module):
    """Stands in for the network: keeps what it is given and answers with the sum of each row."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.factor = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, s: Tensor) -> Tensor:
        self.seen.append(s)
        return self.factor * s.sum(dim=1, keepdim=True)


def embeddings(n: int, d: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    inputs = make_inputs(Case(N=n, D=d, dtype=dtype))
    return inputs.audio, inputs.text


def recorded(n: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The network's input and the similarities (n, n) it should come from."""
    audio, text = embeddings(n)
    module = sk.DynamicRadius(n, **options)
    module.network = Recorder()  # type: ignore[assignment]
    module(audio, text, 9.0)
    (seen,) = module.network.seen
    return seen, 9.0 * text @ audio.t()


def shaken(module: sk.DynamicRadius, dtype: torch.dtype = torch.float64) -> sk.DynamicRadius:
    """Weights that make the radius depend on everything."""
    generator = torch.Generator().manual_seed(0)
    module = module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return module


def near(x: Tensor, y: Tensor, bound: float) -> bool:
    return bool((x.double() - y.double()).norm() <= bound * y.double().norm())


# ------------------------------------------------------------------------------------------- static


def test_static_radius_is_its_parameter():
    module = sk.StaticRadius(0.3)
    audio, text = embeddings(5)
    R = module(audio, text, 9.0)
    assert R.shape == () and R.dtype == torch.float32
    assert torch.equal(R.detach(), torch.tensor(0.3))
    assert torch.equal(sk.StaticRadius()(audio, text, 9.0).detach(), torch.tensor(0.1))
    (3.0 * R).backward()
    assert torch.equal(module.radius.grad, torch.tensor([3.0]))
    assert [name for name, _ in module.named_parameters()] == ["radius"]


def test_static_radius_gets_the_gradient_of_the_loss():
    audio, text = embeddings(20)
    module = sk.SVRLoss(radius=sk.StaticRadius(0.3).double())
    module(audio, text, 9.0).backward()
    R = torch.tensor(0.3, requires_grad=True)
    R = R.detach().double().requires_grad_()
    wanted = torch.autograd.grad(sk.svr_loss_reference(audio, text, R, 9.0), R)[0]
    assert near(module.radius.radius.grad, wanted, 1e-7)


# ------------------------------------------------------------------------------ the network's input


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_similarities_are_the_positive_then_the_negatives_in_order(n):
    seen, s = recorded(n)
    assert seen.shape == (n, n)
    for i in range(n):
        wanted = torch.cat((s[i, i : i + 1], s[i, :i], s[i, i + 1 :]))
        assert torch.equal(seen[i], wanted)


def summary_of(row: Tensor, i: int) -> Tensor:
    """The twenty features of row i, one by one."""
    negatives = torch.cat((row[:i], row[i + 1 :]))
    top = negatives.sort(descending=True).values[:TOP_NEGATIVES]
    features = torch.zeros(WIDTH, dtype=row.dtype)
    features[0] = row[i]
    features[1 : 1 + len(top)] = top
    if len(negatives):
        features[-3] = negatives.mean()
        features[-2] = (negatives.var(unbiased=False) + 1e-6).sqrt()
        features[-1] = negatives.exp().sum().log()
    return features


@pytest.mark.parametrize("n", [1, 2, 7, 16, 17, 18, 60])
def test_summary_features(n):
    """Also with fewer than 16 negatives (zeros), and with none."""
    seen, s = recorded(n, features="summary")
    assert seen.shape == (n, WIDTH) and torch.isfinite(seen).all()
    for i in range(n):
        assert near(seen[i], summary_of(s[i], i), 1e-12)


def test_summary_gradient_is_finite_where_all_negatives_are_equal():
    audio = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
    module = shaken(sk.DynamicRadius(features="summary", hidden=(8, 4)))
    module(audio, torch.ones(5, 3, dtype=torch.float64), 9.0).sum().backward()
    assert torch.isfinite(audio.grad).all()


def test_similarities_are_tied_to_the_batch_size():
    audio, text = embeddings(6)
    message = r"built for batches of 8 pairs, got 6.*drop the last.*features='summary'"
    with pytest.raises(ValueError, match=message):
        sk.DynamicRadius(8)(audio, text, 9.0)
    for n in (1, 6, 9):
        assert sk.DynamicRadius(features="summary")(*embeddings(n), 9.0).shape == (n,)


@pytest.mark.parametrize("features", ["similarities", "summary"])
@pytest.mark.parametrize("init", [0.1, -0.7])
def test_starts_at_init(features, init):
    audio, text = embeddings(30, dtype=torch.float32)
    module = sk.DynamicRadius(30, init=init, features=features)
    assert torch.equal(module(audio, text, 9.0).detach(), torch.full((30,), init))
    default = sk.DynamicRadius(30, features=features)(audio, text, 9.0)
    assert torch.equal(default.detach(), torch.full((30,), 0.1))


def test_the_network_is_the_documented_one():
    shapes = [tuple(p.shape) for p in sk.DynamicRadius(50).parameters()]
    assert shapes == [(256, 50), (256,), (64, 256), (64,), (1, 64), (1,)]
    shapes = [tuple(p.shape) for p in sk.DynamicRadius(features="summary").parameters()]
    assert shapes[0] == (256, WIDTH)
    shapes = [tuple(p.shape) for p in sk.DynamicRadius(50, hidden=(8, 4)).parameters()]
    assert shapes == [(8, 50), (8,), (4, 8), (4,), (1, 4), (1,)]


@pytest.mark.parametrize("features", ["similarities", "summary"])
def test_gradients_reach_everything_unless_detached(features):
    for detached in (False, True):
        leaves = [x.requires_grad_() for x in embeddings(9)]
        leaves.append(torch.tensor(9.0, dtype=torch.float64, requires_grad=True))
        module = sk.DynamicRadius(9, features=features, detach_similarity=detached, hidden=(8, 4))
        shaken(module)(*leaves).square().sum().backward()
        for leaf in leaves:
            assert leaf.grad is None if detached else leaf.grad.abs().max() > 0
        assert all(p.grad.abs().max() > 0 for p in module.parameters())


def test_detached_and_not_give_the_same_values():
    outputs = [
        shaken(sk.DynamicRadius(9, hidden=(8, 4), detach_similarity=detached))
        for detached in (False, True)
    ]
    outputs[1].load_state_dict(outputs[0].state_dict())
    R = [module(*embeddings(9), 9.0) for module in outputs]
    assert torch.equal(R[0], R[1])


def test_gradcheck():
    audio, text = embeddings(5, 3)
    for features in ("similarities", "summary"):
        module = shaken(sk.DynamicRadius(5, features=features, hidden=(4, 3)))
        leaves = [x.clone().requires_grad_() for x in (audio, text)]
        leaves.append(torch.tensor(2.0, dtype=torch.float64, requires_grad=True))
        assert torch.autograd.gradcheck(module, leaves)


# --------------------------------------------------------------------------------------- the chunks


def radius_and_gradients(module: nn.Module, n: int, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in embeddings(n, dtype=dtype)]
    leaves.append(torch.tensor(9.0, dtype=dtype, requires_grad=True))
    R = module(*leaves)
    upstream = torch.linspace(-1, 2, n, dtype=R.dtype)
    return [R.detach(), *torch.autograd.grad(R, [*leaves, *module.parameters()], upstream)]


@pytest.mark.parametrize("features", ["similarities", "summary"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["double", "single"]
)
@pytest.mark.parametrize("rows_in_chunk", [0, 1, 7, 20])
def test_chunks_change_nothing(features, dtype, bound, rows_in_chunk, monkeypatch):
    n = 41
    module = shaken(sk.DynamicRadius(n, features=features, hidden=(8, 4)), dtype)
    whole = radius_and_gradients(module, n, dtype)
    calls = []
    original = module.rows

    def rows(text: Tensor, audio: Tensor, scale: Tensor, first: int) -> Tensor:
        calls.append(len(text))
        return original(text, audio, scale, first)

    monkeypatch.setattr(module, "rows", rows)
    monkeypatch.setattr(radius_module, "CHUNK_BYTES", rows_in_chunk * n * dtype.itemsize)
    parts = radius_and_gradients(module, n, dtype)
    assert max(calls) == max(1, rows_in_chunk)
    for x, y in zip(parts, whole, strict=True):
        assert x.dtype == y.dtype and near(x, y, bound)


def saved_sizes(step: Callable[[], Any]) -> list[int]:
    """Elements of each tensor that autograd keeps for backward."""
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step()
    return sizes


@pytest.mark.parametrize("features", ["similarities", "summary"])
def test_nothing_of_N_squared_is_kept_for_backward(features, monkeypatch):
    n = 64
    module = sk.DynamicRadius(n, features=features, hidden=(8, 4)).double()
    leaves = [x.requires_grad_() for x in embeddings(n)]
    assert max(saved_sizes(lambda: module(*leaves, 9.0))) >= n * n  # the hook sees them
    monkeypatch.setattr(radius_module, "CHUNK_BYTES", 4 * n * 8)
    sizes = saved_sizes(lambda: module(*leaves, 9.0))
    assert sizes and max(sizes) <= n * 12
    assert sum(sizes) < n * n * 8


def test_chunks_without_gradients(monkeypatch):
    module = shaken(sk.DynamicRadius(41, hidden=(8, 4)))
    with torch.no_grad():
        whole = module(*embeddings(41), 9.0)
        monkeypatch.setattr(radius_module, "CHUNK_BYTES", 1)
        assert near(module(*embeddings(41), 9.0), whole, 1e-12)


# -------------------------------------------------------------------------------- inside the loss


@pytest.mark.parametrize("features", ["similarities", "summary"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_module_gradients_are_those_of_the_whole(features, backend):
    """Through the loss and the network at once, against one graph of the specification."""
    audio, text = embeddings(24)
    module = shaken(sk.DynamicRadius(24, features=features, hidden=(8, 4)))
    loss = sk.SVRLoss(radius=module, beta=0.1, backend=backend)
    results = []
    for fused in (True, False):
        leaves = [audio.clone().requires_grad_(), text.clone().requires_grad_()]
        leaves.append(torch.tensor(9.0, dtype=torch.float64, requires_grad=True))
        if fused:
            value = loss(*leaves)
        else:
            value = sk.svr_loss_reference(*leaves[:2], module(*leaves), leaves[2], beta=0.1)
        wanted = [*leaves, *module.parameters()]
        results.append([value.detach(), *torch.autograd.grad(value, wanted)])
    for x, y in zip(*results, strict=True):
        assert near(x, y, 1e-11)


def radii() -> dict[str, Callable[[], nn.Module | None]]:
    return {
        "none": lambda: None,
        "static": lambda: sk.StaticRadius(0.2),
        "similarities": lambda: shaken(sk.DynamicRadius(24, hidden=(8, 4))),
        "summary": lambda: shaken(sk.DynamicRadius(features="summary", hidden=(8, 4))),
    }


@pytest.mark.parametrize("name", radii())
@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_module_normalizes_for_the_radius_too(name, objective):
    """normalize=True on scaled rows is the module without it on unit rows."""
    audio, text = embeddings(24)
    module = radii()[name]()
    outputs = []
    for normalize in (True, False):
        loss = sk.SVRLoss(
            radius=module, normalize=normalize, objective=objective, return_stats=True
        )
        factor = torch.linspace(0.5, 3, 24).double()[:, None] if normalize else 1.0
        value, stats = loss(factor * audio, F.normalize(text, dim=1) * factor, 9.0)
        assert isinstance(stats, sk.SVRStats) and not any(x.requires_grad for x in stats)
        outputs.append((value.detach(), torch.stack(tuple(stats)).nan_to_num(-1.0)))
    for x, y in zip(*outputs, strict=True):
        assert near(x, y, 1e-12)


def test_stats_report_the_radius_of_the_module():
    audio, text = embeddings(24)
    module = shaken(sk.DynamicRadius(24, hidden=(8, 4)))
    _, stats = sk.SVRLoss(radius=module, return_stats=True)(audio, text, 9.0)
    assert near(stats.radius, module(audio, text, 9.0).detach().mean(), 1e-12)
    assert near(stats.gap, (audio - text).norm(dim=1).mean(), 1e-6)
    _, stats = sk.SVRLoss(return_stats=True)(audio, text, 9.0)
    assert stats.radius.isnan() and stats.gap.isnan() and stats.contraction.isnan()


@pytest.mark.parametrize("name", radii())
@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_training_lowers_the_loss(name, objective):
    """Towers, scale and radius together: every parameter moves, and the loss falls."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 10, generator=generator, dtype=torch.float64)
    y = x + 0.5 * torch.randn(24, 10, generator=generator, dtype=torch.float64)
    towers = [nn.Linear(10, 8, dtype=torch.float64) for _ in range(2)]
    for tower in towers:
        nn.init.normal_(tower.weight, std=0.3, generator=generator)
    scale = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))
    module = sk.SVRLoss(radius=radii()[name](), objective=objective, normalize=True, beta=0.01)
    parameters = [*towers[0].parameters(), *towers[1].parameters(), scale, *module.parameters()]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = module(towers[0](x), towers[1](y), scale)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
