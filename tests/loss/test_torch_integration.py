"""What PyTorch asks of an operator: opcheck and torch.compile."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from covering import core, covering
from integration_cases import OPTION_SETS, SMALL, every_option_set, leaves_of, same, step_of
from torch import Tensor

import supclap_kernels as sk
from supclap_kernels.options import Options
from supclap_kernels.testing import (
    DIFFERENTIABLE,
    Case,
    Inputs,
    make_inputs,
)

# ------------------------------------------------------------------------------------ the operators


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@every_option_set
def test_opcheck(case, stats, frozen):
    """Schema, fake kernels and dispatch of both operators, with and without gradients to come."""
    inputs = make_inputs(case)
    options = Options(**case.options, stats=stats)
    tensors = tuple(getattr(inputs, name) for name in (*DIFFERENTIABLE, "ids", "weight"))
    needs = tuple(x is not None and not frozen for x in tensors[:5])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward = torch.ops.supclap_kernels.svr_loss.default
    torch.library.opcheck(forward, (*tensors, needs, *options), test_utils=checks)
    _, values, state, saved = forward(*tensors, needs, *options)
    assert values.shape == (len(sk.SVRStats._fields) if stats else 0,)
    if frozen:
        return
    backward = torch.ops.supclap_kernels.svr_loss_backward.default
    arguments = (inputs.upstream, *tensors, state, saved, needs, *options)
    torch.library.opcheck(backward, arguments, test_utils=checks)


@pytest.mark.parametrize("name", ["infonce", "siglip", "ids and weight", "transposed"])
def test_opcheck_dynamic_shapes(name):
    """AOT dispatch of the operators under symbolic shapes."""
    case = OPTION_SETS[name]
    inputs = make_inputs(case)
    tensors = tuple(getattr(inputs, n) for n in (*DIFFERENTIABLE, "ids", "weight"))
    needs = tuple(x is not None for x in tensors[:5])
    forward = torch.ops.supclap_kernels.svr_loss.default
    arguments = (*tensors, needs, *Options(**case.options))
    torch.library.opcheck(forward, arguments, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", ["infonce", "float64", "siglip", "siglip rows"])
def test_the_outputs_share_no_memory(name):
    """No output aliases another or an input: autograd relies on it."""
    case = OPTION_SETS[name]
    inputs = make_inputs(case)
    tensors = tuple(getattr(inputs, name) for name in (*DIFFERENTIABLE, "ids", "weight"))
    needs = tuple(x is not None for x in tensors[:5])
    options = Options(**case.options, stats=True)
    outputs = torch.ops.supclap_kernels.svr_loss(*tensors, needs, *options)
    gradients = torch.ops.supclap_kernels.svr_loss_backward(
        inputs.upstream, *tensors, *outputs[2:], needs, *options
    )
    every = [x for x in (*outputs, *gradients, *tensors) if x is not None and x.numel()]
    addresses = [x.untyped_storage().data_ptr() for x in every]
    assert len(set(addresses)) == len(addresses)


# ----------------------------------------------------------------------------------------- compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_graph(sizes: Sequence[int]) -> Iterator[int]:
    """The sizes; whatever the first one compiled has to do for the rest."""
    yield sizes[0]
    with torch.compiler.set_stance("fail_on_recompile"):
        yield from sizes[1:]


def compiled_outputs(step: Callable[..., Any], inputs: Inputs, stats: bool) -> dict[str, Tensor]:
    leaves = leaves_of(inputs)
    found = step(leaves, inputs.ids, inputs.weight)
    loss, values = found if stats else (found, None)
    gradients = torch.autograd.grad(loss, leaves, inputs.upstream.to(loss.dtype))
    outputs = {"loss": loss.detach(), **dict(zip(inputs.differentiable(), gradients, strict=True))}
    return outputs if values is None else {**outputs, "stats": torch.stack(tuple(values))}


COMPILED: dict[str, tuple[Case, bool]] = {
    "infonce": (Case(), False),
    "rows, weight, ids": (Case(radius="row", weighted=True, duplicates=True), False),
    "none": (Case(options={"reduction": "none"}), False),
    "siglip": (Case(options={"objective": "siglip"}), False),
    "siglip rows": (Case(options={"objective": "siglip", "reduction": "none"}), False),
    "stats": (Case(radius="row"), True),
    "plain": (Case(radius="none", options={"normalize": True}), False),
    "bfloat16": (Case(dtype=torch.bfloat16), False),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "workspace"),
    [*((name, SMALL) for name in COMPILED), ("infonce", 2**28), ("siglip", 2**28)],
)
def test_compile_is_eager_with_one_graph(name, workspace):
    """One graph for every N, also across the workspace's boundary; equal to the last bit."""
    case, stats = COMPILED[name]
    step = step_of(case, stats, workspace=workspace)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in one_graph((24, 37, 64, 300)):
        inputs = make_inputs(replace(case, N=N))
        eager = compiled_outputs(step, inputs, stats)
        assert same(compiled_outputs(compiled, inputs, stats), eager), N


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["infonce", "siglip", "stats"])
def test_compile_with_static_shapes(name):
    case, stats = COMPILED[name]
    step = step_of(case, stats)
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    for N in (24, 37, 24):
        inputs = make_inputs(replace(case, N=N))
        eager = compiled_outputs(step, inputs, stats)
        assert same(compiled_outputs(compiled, inputs, stats), eager), N


EVERY = {
    "renormalize": (False, True),
    "normalize": (False, True),
    "alpha": (1.0, 0.0),
    "beta": (0.0, 0.2),
    "reduction": ("mean", "sum", "none"),
    "objective": ("infonce", "siglip"),
    "bilateral": ("none", "mirror", "shared"),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("n", core(list(range(12))))
def test_compile_every_option(n):
    """Pairs of all options and of what a call is given."""
    rows = covering(
        12, 0, **EVERY, radius=("none", "scalar", "row"), weighted=(False, True),
        duplicates=(False, True),
    )  # fmt: skip
    for row in rows[n::12]:
        fields = {name: row[name] for name in ("radius", "weighted", "duplicates")}
        case = Case(**fields, options={name: row[name] for name in EVERY})
        step = step_of(case)
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for N in one_graph((24, 37)):
            inputs = make_inputs(replace(case, N=N))
            eager = compiled_outputs(step, inputs, False)
            assert same(compiled_outputs(compiled, inputs, False), eager), row
        torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "objective, bilateral",
    core(list(itertools.product(("infonce", "siglip"), ("mirror", "none", "shared"))), every=3),
)
def test_compile_with_the_default_compiler(tmp_path, monkeypatch, objective, bilateral):
    """Inductor, where the graph around the operator is compiled too; nothing cached before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    options = {"objective": objective, "bilateral": bilateral}
    case = Case(radius="row", weighted=True, options=options)
    step = step_of(case)
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for N in one_graph((24, 37)):
        inputs = make_inputs(replace(case, N=N))
        assert same(
            compiled_outputs(compiled, inputs, False), compiled_outputs(step, inputs, False)
        )


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_a_module_with_a_float_scale():
    """The module with its own radius; numbers instead of tensors do not recompile over N either."""
    module = sk.SVRLoss(radius=sk.StaticRadius(0.2), beta=0.1)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in one_graph((24, 37, 64)):
        outputs = []
        for function in (module, compiled):
            inputs = make_inputs(Case(N=N))
            leaves = [x.requires_grad_() for x in (inputs.audio, inputs.text)]
            loss = function(*leaves, 14.0)
            wanted = [*leaves, module.radius.radius]
            outputs.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
        assert all(torch.equal(x, y) for x, y in zip(*outputs, strict=True))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_without_gradients():
    step = step_of(Case())
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in one_graph((24, 37, 300)):
        inputs = make_inputs(Case(N=N))
        leaves = list(inputs.differentiable().values())
        assert torch.equal(compiled(leaves, None, None), step(leaves, None, None))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_second_graph_would_be_noticed():
    """What the tests above rely on."""
    compiled = torch.compile(lambda x: x + x.shape[0], dynamic=False, backend="eager")
    with pytest.raises(RuntimeError, match="recompile"):
        for N in one_graph((24, 37)):
            compiled(torch.ones(N))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_raises_the_same_errors():
    compiled = torch.compile(sk.fused_svr_loss, dynamic=True, backend="eager")
    x = make_inputs(Case()).audio
    with pytest.raises(ValueError, match="radius must be a number, a 0-d tensor or have shape"):
        compiled(x, x, torch.ones(3))
    with pytest.raises(ValueError, match="objective must be one of"):
        compiled(x, x, objective="clip")
