"""What a program around the library may have set in PyTorch, and every public call, whose results
do not depend on it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from integration_cases import OPTION_SETS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import supclap_kernels as sk
from supclap_kernels import direct, gradients, tables, testing
from supclap_kernels.autocast import autocast_off
from supclap_kernels.integrations import laion_clap, open_clip, sentence_transformers, transformers
from supclap_kernels.options import Options
from supclap_kernels.testing import DIFFERENTIABLE, Case, make_inputs

Call = Callable[[], Any]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


SETTINGS: dict[str, Callable[[], Any]] = {
    "another default device": lambda: default_device("meta"),
    "float64 by default": lambda: default_dtype(torch.float64),
    "float16 by default": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def equal(x: Any, y: Any) -> bool:
    """Whether two results are one, bit for bit."""
    if not isinstance(x, Tensor):
        return bool(x == y)
    alike = x.dtype == y.dtype and x.device == y.device and x.shape == y.shape
    return (
        alike and torch.equal(x.isnan(), y.isnan()) and torch.equal(*map(torch.nan_to_num, (x, y)))
    )


def changed(calls: dict[str, Call]) -> list[str]:
    """The calls that give something else under a setting, or fail."""
    found = []
    for name, call in calls.items():
        plain = tree_leaves(call())
        for setting, enter in SETTINGS.items():
            try:
                with enter():
                    under = tree_leaves(call())
            except Exception as error:
                found.append(f"{name}, {setting}: {type(error).__name__}: {error}")
                continue
            if len(plain) != len(under) or not all(map(equal, plain, under)):
                found.append(f"{name}, {setting}: other values")
    return found


def step(loss: Callable[..., Any], case: Case, **options: Any) -> Any:
    """Loss, statistics if asked, and every gradient of a case."""
    inputs = make_inputs(case)
    names = [*inputs.differentiable()]

    def call() -> Any:
        leaves = {
            n: x.detach().clone().requires_grad_() for n, x in inputs.differentiable().items()
        }
        found = loss(
            *(leaves.get(name) for name in DIFFERENTIABLE), ids=inputs.ids, weight=inputs.weight,
            **case.options, **options,
        )  # fmt: skip
        value = found[0] if isinstance(found, tuple) else found
        with autocast_off(value):  # as PyTorch wants backward to be run
            value.backward(inputs.upstream.to(value.dtype))
        return found, [leaves[name].grad for name in names]

    return call


def with_gradients(function: Callable[..., Any], *rows: Tensor, parameters: Any = ()) -> Call:
    """function(*rows) and the gradients of rows and parameters."""
    parameters = list(parameters)

    def call() -> Any:
        leaves = [x.detach().clone().requires_grad_() for x in rows]
        found = function(*leaves)
        value = found[0] if isinstance(found, tuple) else found
        with autocast_off(value):
            wanted = [*leaves, *parameters]
            return found, torch.autograd.grad(value, wanted, allow_unused=True)

    return call


class Given(nn.Module):
    """Stands in for a sentence encoder: its features are the embeddings."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["x"]}


class Linear(nn.Module):
    """Stands in for the network of a radius: not an operation that autocast lowers."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1e-3))

    def forward(self, s: Tensor) -> Tensor:
        return self.factor * s.sum(dim=1, keepdim=True)


def dynamic(**options: Any) -> sk.DynamicRadius:
    module = sk.DynamicRadius(**options)
    module.network = Linear()  # type: ignore[assignment]
    return module


def kernels(backends: list[str], cases: dict[str, Case], **more: Any) -> dict[str, Call]:
    """fused_svr_loss of every case on every backend."""
    return {
        f"fused_svr_loss {name} on {backend}": step(
            sk.fused_svr_loss, case, backend=backend, return_stats=True, **more
        )
        for name, case in cases.items()
        for backend in backends
        if backend in ("cpu", "reference") or case.dtype != torch.float64
    }


CASES = {
    **OPTION_SETS,
    "literal rows": Case(gap=1e-3, radius="row"),
    "literal rows, shared": Case(gap=1e-3, radius="row", options={"bilateral": "shared"}),
    "float16": Case(dtype=torch.float16, options={"normalize": True}),
    "bfloat16 normalized": Case(D=16, dtype=torch.bfloat16, options={"normalize": True}),
    "bfloat16 siglip": Case(dtype=torch.bfloat16, options={"objective": "siglip"}),
}


def calls(group: Any = None) -> dict[str, Call]:
    """Every public function and module; over a group where one is given."""
    rank, world = (0, 1) if group is None else (group.rank(), group.size())
    over: dict[str, Any] = {} if group is None else {"group": group}
    inputs = make_inputs(Case(seed=rank))
    audio, text, ids, weight = inputs.audio, inputs.text, torch.arange(37) // 2, torch.rand(37)
    rows, N = (audio, text), 37 * world
    scale, bias = torch.tensor(12.0), torch.tensor(-5.0)
    found = kernels(["cpu", "reference"], CASES, **over)
    found["svr_loss_reference"] = step(sk.svr_loss_reference, Case(), **over)
    numbers = {"radius": 0.1, "logit_scale": 14.0, "ids": ids, "weight": weight}
    for objective, more in (("infonce", {}), ("siglip", {"logit_bias": -5.0})):
        options: dict[str, Any] = {**numbers, **more, "objective": objective}
        for backend in ("cpu", "reference"):
            loss = functools.partial(sk.fused_svr_loss, backend=backend, **options, **over)
            found[f"numbers {objective} {backend}"] = with_gradients(loss, *rows)
    for normalize in (False, True):
        for name, radius in {
            "plain": None,
            "StaticRadius": sk.StaticRadius(0.2),
            "DynamicRadius": dynamic(batch_size=N),
            "DynamicRadius summary": dynamic(features="summary"),
            "DynamicRadius detached": dynamic(features="summary", detach_similarity=True),
        }.items():
            module = sk.SVRLoss(radius, normalize=normalize, return_stats=True, **over)
            found[f"SVRLoss {name} normalize={normalize}"] = with_gradients(
                functools.partial(module, ids=ids), *rows, scale, parameters=module.parameters()
            )
    for name, adapter in adapters(rank, world).items():
        scales = (scale, bias) if "SigLip" in name else (scale,)
        found[name] = with_gradients(adapter, *rows, *scales, parameters=adapter.parameters())
    for kappa in (0.0, 1.0):
        options = {"mlp_loss": True, "weight_loss_kappa": kappa, "rank": rank, "world_size": world}
        if world == 1 or not kappa:
            four = functools.partial(four_features, laion_clap.ClipLoss(**options))
            found[f"laion_clap kappa={kappa}"] = with_gradients(four, *rows, scale)
    sentences = sentence_transformers.MultipleNegativesSymmetricRankingLoss(
        Given(), gather_across_devices=group is not None
    )
    of_columns = lambda a, t: sentences([{"x": a}, {"x": t}])  # noqa: E731
    found["sentence_transformers"] = with_gradients(of_columns, *rows)
    found["transformers"] = with_gradients(functools.partial(of_outputs, **over), *rows, scale)
    if group is None:
        found |= of_one_process(audio, text)
    return found


def of_outputs(audio: Tensor, text: Tensor, scale: Tensor, **options: Any) -> Any:
    outputs = SimpleNamespace(audio_embeds=audio, text_embeds=text)
    return transformers.clap_loss(outputs, scale, radius=0.1, **options)


def four_features(loss: nn.Module, audio: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    found: Tensor = loss(audio, text, scale, scale, text, audio)
    return found


def adapters(rank: int, world: int) -> dict[str, nn.Module]:
    ranks: dict[str, Any] = {"rank": rank, "world_size": world}
    return {
        "open_clip.ClipLoss": open_clip.ClipLoss(**ranks, radius=sk.StaticRadius()),
        "open_clip.ClipLoss local": open_clip.ClipLoss(True, **ranks),
        "open_clip.SigLipLoss": open_clip.SigLipLoss(**ranks),
        "open_clip.SigLipLoss radius": open_clip.SigLipLoss(**ranks, radius=sk.StaticRadius()),
        "laion_clap.ClipLoss": laion_clap.ClipLoss(**ranks),
    }


def of_one_process(audio: Tensor, text: Tensor) -> dict[str, Call]:
    """What knows no group."""
    found: dict[str, Call] = {}
    radius = torch.full((37,), 0.2)
    for objective in ("infonce", "siglip"):
        for bilateral in ("none", "mirror", "shared"):
            options = {"objective": objective, "bilateral": bilateral, "normalize": True}
            for kind, R in {"plain": None, "number": 0.1, "rows": radius}.items():
                for function in (sk.force_decomposition, gradients.loss_and_gradients):
                    call = functools.partial(function, audio, text, R, 14.0, **options)
                    found[f"{function.__name__} {kind} {options}"] = call
    for name, case in CASES.items():
        rounded = {"rounded_weights": case.dtype == torch.bfloat16}
        check = functools.partial(testing.check, sk.fused_svr_loss, case, **rounded)
        found[f"testing.check {name}"] = check
        found[f"make_inputs {name}"] = functools.partial(values_of, case)
    found["Queue and Negatives"] = with_gradients(past_pairs, audio, text)
    found["memory_estimate"] = lambda: sk.memory_estimate(500, 64)
    found["explain and available_backends"] = lambda: [sk.explain(), sk.available_backends()]
    found["tune"] = tuned
    found["cached_step"] = lambda: cached(audio, text)
    with_radius = functools.partial(hung, nn.Identity(), sk.StaticRadius(0.2))
    found["attach_radius and detach_radius"] = with_gradients(with_radius, audio, text)
    found["fake kernels"] = lambda: faked(audio, text)
    for objective in ("infonce", "siglip"):
        loss = functools.partial(compiled, objective=objective)
        found[f"compiled {objective}"] = with_gradients(loss, audio, text)
    return found


def past_pairs(audio: Tensor, text: Tensor) -> Tensor:
    queue = sk.Queue(20)
    queue.push(text, audio)
    past = queue.negatives()
    assert past is not None
    loss: Tensor = sk.fused_svr_loss(audio, text, 0.2, 14.0, negatives=sk.Negatives(*past))
    return loss


def tuned() -> bool:
    """Whether `tune` writes a table; it is removed, since nothing else shall depend on it."""
    path, device = sk.tune("cpu", budget=0.1, report=lambda line: None), torch.device("cpu")
    written = path.is_file() and tables.load(device) is not None
    tables.reset(device)
    direct.forget()
    return written


def hung(model: nn.Module, radius: nn.Module, audio: Tensor, text: Tensor) -> Any:
    """The loss of a model's embeddings while its radius hangs on it."""
    criterion = sk.SVRLoss(sk.attach_radius(model, radius))
    found = criterion(model(audio), text, 14.0)
    assert sk.detach_radius(model) is radius
    return found


def faked(audio: Tensor, text: Tensor) -> Any:
    """What the operators' fake kernels promise."""
    scale, needs, mode = audio[0, 0], (True, True, False, True, False), FakeTensorMode()
    given = [*(mode.from_tensor(x) for x in (audio, text)), None, mode.from_tensor(scale)]
    given += [None] * 3
    operators = torch.ops.supclap_kernels
    with mode:
        found = operators.svr_loss(*given, needs, *Options())
        gradients = operators.svr_loss_backward(found[0], *given, *found[2:], needs, *Options())
    return [(x.shape, x.dtype, x.device) for x in (*found, *gradients)]


def compiled(audio: Tensor, text: Tensor, **options: Any) -> Tensor:
    torch.compiler.reset()  # PyTorch compiles anew for each of its settings
    loss = torch.compile(sk.fused_svr_loss, backend="aot_eager")
    return loss(audio, text, 0.1, 14.0, **options)


def values_of(case: Case) -> list[Any]:
    return list(vars(make_inputs(case)).values())


class Scaled(nn.Module):
    """An encoder with dropout that autocast does not lower."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(19))

    def forward(self, x: Tensor) -> Tensor:
        return torch.dropout(self.factor * x, 0.3, True)


def cached(audio: Tensor, text: Tensor) -> Any:
    state = torch.get_rng_state()
    with torch.device("cpu"):
        towers = nn.ModuleList([Scaled(), Scaled()]).float()
    torch.set_rng_state(torch.Generator().manual_seed(5).get_state())
    try:
        loss = sk.cached_step(
            list(towers), (audio, text), lambda a, t: sk.fused_svr_loss(a, t, 0.1), 10
        )
    finally:
        torch.set_rng_state(state)
    return loss, [parameter.grad for parameter in towers.parameters()]
