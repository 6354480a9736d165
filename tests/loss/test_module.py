"""Repeatable, clean and frugal calls; the module as PyTorch expects one."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from integration_cases import SMALL, every_option_set, fused, leaves_of, same, step_of
from torch import Tensor, nn

import supclap_kernels as sk
from supclap_kernels import ops
from supclap_kernels.backends.call import Tensors
from supclap_kernels.options import Options
from supclap_kernels.testing import (
    Case,
    check,
    make_inputs,
)

# ---------------------------------------------------------------------- repeatable, clean, frugal


@every_option_set
def test_repeated_runs_are_equal(case):
    inputs = make_inputs(case)
    first = fused(case, inputs)
    assert all(same(fused(case, inputs), first) for _ in range(3))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every torch.empty is full of NaN (or of the largest integer)."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before)


@every_option_set
def test_uninitialised_memory_is_never_read(case, request):
    inputs = make_inputs(case)
    clean = fused(case, inputs)
    _, stats = step_of(case, True)(leaves_of(inputs), inputs.ids, inputs.weight)
    request.getfixturevalue("poisoned")
    assert torch.empty(3).isnan().all()
    assert same(fused(case, inputs), clean)
    _, again = step_of(case, True)(leaves_of(inputs), inputs.ids, inputs.weight)
    assert torch.equal(
        torch.stack(tuple(again)).nan_to_num(7), torch.stack(tuple(stats)).nan_to_num(7)
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("N", [1, 63, 65, 129, 530])
def test_ragged_sizes_under_poison(N):
    """The borders of tiles, kept and recomputed, against the specification."""
    for workspace in (2**28, SMALL):
        case = Case(N=N, D=17, radius="row", options={"workspace": workspace})
        result = fused(case, make_inputs(case))
        if N == 1:
            assert all(not value.abs().max() > 0 for value in result.values())
        else:
            check(sk.fused_svr_loss, case)


@every_option_set
def test_inputs_are_not_modified(case):
    inputs = make_inputs(case)
    before = {name: x.clone() for name, x in vars(inputs).items() if x is not None}
    versions = {name: getattr(inputs, name)._version for name in before}
    fused(case, inputs)
    for name, x in before.items():
        assert torch.equal(getattr(inputs, name), x), name
        assert getattr(inputs, name)._version == versions[name]


def test_an_input_changed_before_backward_is_noticed():
    inputs = make_inputs(Case())
    audio = (1.0 * inputs.audio).requires_grad_()
    text = inputs.text.clone()
    loss = sk.fused_svr_loss(audio, text, 0.1)
    text.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def held_bytes(step: Callable[[], Any]) -> int:
    """Bytes that `step` allocates through PyTorch and does not free."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    return sum(e.self_cpu_memory_usage for e in profile.events() if e.name == "[memory]") + sum(
        e.self_cpu_memory_usage for e in profile.key_averages() if e.key != "[memory]"
    )


@pytest.mark.parametrize("case", [Case(N=200), Case(N=200, options={"objective": "siglip"})])
def test_a_second_step_leaves_nothing_behind(case):
    inputs = make_inputs(case)
    kept: list[Any] = []

    def leak() -> None:
        kept.append(torch.empty(1000))

    def step() -> None:
        fused(case, inputs, workspace=2**28)

    step()
    assert held_bytes(leak) == 4000
    assert held_bytes(step) == 0


# ---------------------------------------------------------------------------------- the module


def modules() -> dict[str, Callable[[], sk.SVRLoss]]:
    return {
        "none": lambda: sk.SVRLoss(),
        "static": lambda: sk.SVRLoss(radius=sk.StaticRadius(0.2), beta=0.1),
        "dynamic": lambda: sk.SVRLoss(radius=sk.DynamicRadius(37, hidden=(8, 4)), alpha=0.5),
        "summary": lambda: sk.SVRLoss(
            radius=sk.DynamicRadius(features="summary", hidden=(8, 4)), normalize=True
        ),
    }


def shaken(module: nn.Module) -> nn.Module:
    """Away from the initial values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def module_outputs(module: nn.Module) -> list[Tensor]:
    inputs = make_inputs(Case())
    parameters = list(module.parameters())
    leaves = [x.requires_grad_() for x in (inputs.audio, inputs.text)]
    loss = module(*leaves, inputs.logit_scale)
    return [loss.detach(), *torch.autograd.grad(loss, [*leaves, *parameters])]


def reloaded(module: nn.Module, fresh: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


@pytest.mark.parametrize("name", modules())
def test_copies_of_the_module(name):
    make = modules()[name]
    module = shaken(make())
    outputs = module_outputs(module)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), reloaded(module, make()))
    for other in copies:
        assert all(torch.equal(x, y) for x, y in zip(outputs, module_outputs(other), strict=True))
        assert repr(other) == repr(module)
    if list(module.parameters()):
        shaken(copies[0])
        others = module_outputs(copies[0])
        assert not torch.equal(others[0], outputs[0])
        assert all(torch.equal(x, y) for x, y in zip(outputs, module_outputs(module), strict=True))


def test_state_dict_names():
    static = sk.SVRLoss(radius=sk.StaticRadius(0.2)).state_dict()
    assert list(static) == ["radius.radius"] and static["radius.radius"].shape == (1,)
    dynamic = sk.SVRLoss(radius=sk.DynamicRadius(9)).state_dict()
    layers = [f"radius.network.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert list(dynamic) == layers
    assert not sk.SVRLoss().state_dict()


@pytest.mark.parametrize("name", modules())
@pytest.mark.parametrize("parameters", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embeddings", [torch.float64, torch.float32, torch.bfloat16])
def test_module_to_another_dtype(name, parameters, embeddings):
    """The parameters' dtype and the embeddings' are free of each other."""
    module = shaken(modules()[name]()).to(parameters)
    inputs = make_inputs(Case(dtype=embeddings))
    leaves = [x.requires_grad_() for x in (inputs.audio, inputs.text)]
    loss = module(*leaves, inputs.logit_scale)
    loss.backward()
    assert loss.dtype == (torch.float64 if embeddings == torch.float64 else torch.float32)
    for x in (*leaves, *module.parameters()):
        assert x.grad.dtype == x.dtype and torch.isfinite(x.grad).all()


def test_module_is_the_function():
    inputs = make_inputs(Case(weighted=True, duplicates=True, options={"objective": "siglip"}))
    options = {"objective": "siglip", "bilateral": "none", "alpha": 0.7, "beta": 0.3}
    options |= {"reduction": "none", "renormalize": True, "normalize": True}
    module = sk.SVRLoss(radius=sk.StaticRadius(0.2), **options)
    tensors = {"ids": inputs.ids, "weight": inputs.weight, "logit_bias": inputs.logit_bias}
    scale = inputs.logit_scale
    ours = module(inputs.audio, inputs.text, scale, **tensors)
    wanted = sk.fused_svr_loss(inputs.audio, inputs.text, 0.2, scale, **tensors, **options)
    assert torch.equal(ours, wanted)
    for option, value in options.items():
        assert f"{option}={value!r}" in repr(module)


def test_the_operators_take_plain_inputs():
    """Without stats there are none; the operator, which cannot say so, returns an empty tensor."""
    inputs = make_inputs(Case())
    tensors = Tensors(inputs.audio, inputs.text, None, inputs.logit_scale, None, None, None)
    loss, stats = ops.svr_loss(tensors, Options())
    assert loss.shape == () and stats is None
    watched, empty, *_ = torch.ops.supclap_kernels.svr_loss(*tensors, [False] * 5, *Options())
    assert torch.equal(watched, loss) and empty.shape == (0,)


def test_forward_mode_is_not_silently_zero():
    """A tangent is the right one or an error, never dropped."""
    inputs = make_inputs(Case(N=6, D=4, dtype=torch.float64))
    spec, fused_loss = sk.svr_loss_reference, sk.fused_svr_loss
    tangent = torch.ones_like(inputs.audio)

    def slope(function: Callable[..., Tensor]) -> Tensor:
        def loss(audio: Tensor) -> Tensor:
            return function(audio, inputs.text, 0.1)

        return torch.func.jvp(loss, (inputs.audio,), (tangent,))[1]

    wanted = slope(spec)
    assert wanted.abs() > 0
    try:
        found = slope(fused_loss)
    except (RuntimeError, NotImplementedError):
        return
    assert (found - wanted).abs() <= 1e-10 * wanted.abs()
