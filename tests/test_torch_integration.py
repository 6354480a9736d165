"""What PyTorch asks of an operator: opcheck, compile, autocast, scaling, graphs, copies, memory."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import supclap_kernels as sk
from supclap_kernels import ops
from supclap_kernels.backends.cpu import Inputs as OpInputs
from supclap_kernels.options import Options
from supclap_kernels.testing import (
    DIFFERENTIABLE,
    Case,
    Inputs,
    Outputs,
    baseline,
    check,
    evaluate,
    floors,
    make_inputs,
    truth,
    violations,
)

SMALL = 2**16
"""A workspace that holds the panels of small batches only."""


def same(x: Outputs, y: Outputs) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def fused(case: Case, inputs: Inputs, **options: Any) -> Outputs:
    return evaluate(sk.fused_svr_loss, inputs, **case.options, **options)


def leaves_of(inputs: Inputs) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in inputs.differentiable().values()]


OPTION_SETS: dict[str, Case] = {
    "infonce": Case(),
    "plain": Case(radius="none"),
    "rows": Case(radius="row", options={"beta": 0.1}),
    "none": Case(radius="row", options={"reduction": "none", "bilateral": "none"}),
    "shared": Case(options={"bilateral": "shared", "reduction": "sum"}),
    "siglip": Case(options={"objective": "siglip"}),
    "siglip rows": Case(radius="row", options={"objective": "siglip", "reduction": "none"}),
    "ids and weight": Case(radius="row", weighted=True, duplicates=True),
    "siglip ids and weight": Case(
        weighted=True, duplicates=True, options={"objective": "siglip", "bilateral": "shared"}
    ),
    "normalize": Case(options={"normalize": True}),
    "renormalize": Case(radius="row", options={"renormalize": True}),
    "transposed": Case(layout="transposed"),
    "strided": Case(layout="strided", options={"normalize": True}),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float64": Case(dtype=torch.float64, radius="row", layout="transposed"),
    "recomputed": Case(N=150, options={"workspace": SMALL}),
}
every_option_set = pytest.mark.parametrize("case", OPTION_SETS.values(), ids=OPTION_SETS.keys())


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
    assert values.shape == (ops.STATS if stats else 0,)
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


def step_of(case: Case, stats: bool = False, **options: Any) -> Callable[..., Any]:
    names = list(make_inputs(case).differentiable())

    def step(leaves: list[Tensor], ids: Tensor | None, weight: Tensor | None) -> Any:
        arguments = dict(zip(names, leaves, strict=True))
        return sk.fused_svr_loss(
            **arguments, ids=ids, weight=weight, return_stats=stats, **case.options, **options
        )

    return step


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


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_the_default_compiler(tmp_path, monkeypatch):
    """Inductor, where the graph around the operator is compiled too; nothing cached before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = Case(radius="row", weighted=True)
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


# --------------------------------------------------------------------- mixed precision and scaling


@every_option_set
def test_autocast_changes_nothing(case):
    """Forward and backward: the accumulation stays in the accumulator's dtype."""
    inputs = make_inputs(case)
    plain = fused(case, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert same(fused(case, inputs), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_towers_feed_the_loss(dtype):
    """Embeddings that autocast made narrow arrive as such, and their gradients go back through."""
    generator = torch.Generator().manual_seed(0)
    tower = nn.Linear(8, 16)
    x = torch.randn(12, 8, generator=generator)
    with torch.autocast("cpu", dtype=dtype):
        audio, text = tower(x), tower(2 * x)
        assert audio.dtype == dtype
        loss = sk.fused_svr_loss(audio, text, 0.1, normalize=True)
    loss.backward()
    assert loss.dtype == torch.float32 and tower.weight.grad.dtype == torch.float32
    assert torch.isfinite(tower.weight.grad).all() and tower.weight.grad.abs().max() > 0


SCALED: list[Case] = [
    Case(N=64, D=32, dtype=torch.float16, radius="row"),
    Case(N=64, D=32, dtype=torch.float16, scale=4.0, options={"objective": "siglip"}),
    Case(N=64, D=32, dtype=torch.float16, options={"normalize": True}),
    Case(N=64, D=32, dtype=torch.float16, radius="none", options={"workspace": 0}),
]


@pytest.mark.parametrize("case", SCALED, ids=str)
def test_gradient_scaler(case):
    """float16 under a factor of 65536: nothing overflows, the unscaled gradients pass the rule."""
    factor = 65536.0
    inputs = make_inputs(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=factor)

    def scaled(*arguments: Tensor, **options: Any) -> Tensor:
        return scaler.scale(sk.fused_svr_loss(*arguments, **options))

    found = evaluate(scaled, inputs, **case.options)
    assert found["text"].dtype == torch.float16 and found["text"].abs().max() > 100
    result = {name: (x.double() / factor).to(x.dtype) for name, x in found.items()}
    exact = truth(case, inputs)
    wrong = violations(result, exact, baseline(case, inputs), floors(case, inputs, exact))
    assert not wrong, wrong


# -------------------------------------------------------------------------------------- the graph


@every_option_set
def test_retain_graph_twice(case):
    """A second backward is repeatable and linear in the upstream gradient (here: times 4)."""
    inputs = make_inputs(case)
    leaves = leaves_of(inputs)
    arguments = dict(zip(inputs.differentiable(), leaves, strict=True))
    options = {**case.options, "ids": inputs.ids, "weight": inputs.weight}
    loss = sk.fused_svr_loss(**arguments, **options)
    upstream = inputs.upstream.to(loss.dtype)
    first, second, again = (
        torch.autograd.grad(loss, leaves, factor * upstream, retain_graph=True)
        for factor in (1.0, 4.0, 1.0)
    )
    for x, y, z in zip(first, second, again, strict=True):
        assert torch.equal(4.0 * x, y)  # a power of two: exact
        assert torch.equal(x, z)
        assert x.abs().max() > 0
    last = torch.autograd.grad(loss, leaves, 3.0 * upstream)
    for x, y in zip(first, last, strict=True):
        bound = 20 * max(torch.finfo(x.dtype).eps, torch.finfo(loss.dtype).eps)
        assert (3.0 * x.double() - y.double()).norm() <= bound * y.double().norm()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves, upstream)


def test_one_gradient_accumulates_over_two_losses():
    inputs = make_inputs(Case(dtype=torch.float64))
    audio, text = (x.clone().requires_grad_() for x in (inputs.audio, inputs.text))
    single = torch.autograd.grad(sk.fused_svr_loss(audio, text, 0.1), audio)[0]
    (sk.fused_svr_loss(audio, text, 0.1) + sk.fused_svr_loss(audio, text, 0.1)).backward()
    assert torch.equal(audio.grad, 2.0 * single)


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_every_subset_of_gradients(objective):
    """Frozen inputs keep `.grad is None`; the others get the bits they get together."""
    case = Case(radius="row", weighted=True, options={"objective": "siglip", "beta": 0.1})
    inputs = make_inputs(case)
    arguments = inputs.differentiable()
    options = {**case.options, "objective": objective}
    if objective == "infonce":
        del arguments["logit_bias"]
    whole: dict[str, Tensor] = {}
    for chosen in itertools.product((True, False), repeat=len(arguments)):
        leaves = {
            name: x.detach().clone().requires_grad_(need)
            for (name, x), need in zip(arguments.items(), chosen, strict=True)
        }
        loss = sk.fused_svr_loss(**leaves, weight=inputs.weight, **options)
        assert loss.requires_grad == any(chosen)
        if any(chosen):
            loss.backward()
        if all(chosen):
            whole = {name: leaf.grad for name, leaf in leaves.items()}
            assert all(g.abs().max() > 0 for g in whole.values())
        for (name, leaf), need in zip(leaves.items(), chosen, strict=True):
            if need:
                assert torch.equal(leaf.grad, whole[name]), (name, chosen)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("frozen", ["audio", "text"])
def test_a_frozen_tower_costs_nothing(frozen, monkeypatch):
    """Half of the gradient's products are left out."""
    from supclap_kernels.backends.products import LibraryProducts

    counted = []
    original = LibraryProducts.accumulate

    def accumulate(self: LibraryProducts, *arguments: Tensor) -> None:
        counted.append(1)
        original(self, *arguments)

    monkeypatch.setattr(LibraryProducts, "accumulate", accumulate)
    counts = []
    for names in ({"audio", "text"}, {"audio", "text"} - {frozen}):
        inputs = make_inputs(Case())
        leaves = {n: getattr(inputs, n).requires_grad_(n in names) for n in ("audio", "text")}
        counted.clear()
        sk.fused_svr_loss(**leaves, radius=0.1).backward()
        counts.append(len(counted))
    assert counts[0] == 2 * counts[1] > 0


def test_only_the_inputs_asked_for_get_gradients():
    """torch.autograd.grad of one input of several that require it."""
    inputs = make_inputs(Case())
    leaves = leaves_of(inputs)
    arguments = dict(zip(inputs.differentiable(), leaves, strict=True))
    whole = torch.autograd.grad(sk.fused_svr_loss(**arguments), leaves)
    for leaf, wanted in zip(leaves, whole, strict=True):
        (gradient,) = torch.autograd.grad(sk.fused_svr_loss(**arguments), leaf)
        assert torch.equal(gradient, wanted)
        assert all(other.grad is None for other in leaves)


@every_option_set
def test_no_grad_and_inference_mode(case):
    inputs = make_inputs(case)
    leaves = leaves_of(inputs)
    arguments = dict(zip(inputs.differentiable(), leaves, strict=True))
    options = {**case.options, "ids": inputs.ids, "weight": inputs.weight, "return_stats": True}
    loss, stats = sk.fused_svr_loss(**arguments, **options)
    assert loss.requires_grad and not any(value.requires_grad for value in stats)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            other, values = sk.fused_svr_loss(**arguments, **options)
        assert not other.requires_grad
        if not case.options.get("objective") == "siglip":  # one sweep instead of two
            assert torch.equal(other, loss.detach())
        assert abs(float((other - loss.detach()).norm())) <= 1e-6 * float(loss.detach().norm())
        for x, y in zip(values, stats, strict=True):
            assert torch.equal(x.isnan(), y.isnan())
            assert bool((x - y).abs() <= 1e-6 * y.abs()) or bool(y.isnan())


def test_inference_tensors_as_inputs():
    with torch.inference_mode():
        audio, text = torch.randn(2, 9, 5).unbind()
        inside = sk.fused_svr_loss(audio, text, 0.1)
    assert torch.equal(inside, sk.fused_svr_loss(audio, text, 0.1))


@pytest.mark.parametrize("options", [{}, {"objective": "siglip"}, {"reduction": "none"}])
def test_second_derivative_is_a_clear_error(options):
    inputs = make_inputs(Case(N=5, D=4))
    audio = inputs.audio.requires_grad_()
    loss = sk.fused_svr_loss(audio, inputs.text, 0.1, **options).sum()
    (gradient,) = torch.autograd.grad(loss, audio, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(gradient.sum(), audio)


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_second_derivative_of_the_reference(objective):
    case = Case(N=4, D=3, dtype=torch.float64, radius="row", options={"objective": objective})
    inputs = make_inputs(case)
    names = list(inputs.differentiable())

    def loss(*leaves: Tensor) -> Tensor:
        arguments = dict(zip(names, leaves, strict=True))
        return sk.fused_svr_loss(**arguments, backend="reference", beta=0.1, **case.options)

    assert torch.autograd.gradcheck(loss, leaves_of(inputs))
    assert torch.autograd.gradgradcheck(loss, leaves_of(inputs))


def test_gradcheck_of_the_operator():
    case = Case(N=5, D=3, dtype=torch.float64, radius="row")
    inputs = make_inputs(case)
    names = list(inputs.differentiable())

    def loss(*leaves: Tensor) -> Tensor:
        return sk.fused_svr_loss(**dict(zip(names, leaves, strict=True)), reduction="none")

    assert torch.autograd.gradcheck(loss, leaves_of(inputs))


def test_create_graph_beside_a_penalty_of_another_part():
    """A gradient penalty elsewhere: our part is in the graph, but not differentiated twice."""
    inputs = make_inputs(Case(dtype=torch.float64))
    tower = nn.Linear(19, 19, dtype=torch.float64)
    audio = tower(inputs.audio)
    penalised = audio.detach().requires_grad_()
    inner = nn.functional.softplus(tower(penalised)).sum()
    (slope,) = torch.autograd.grad(inner, penalised, create_graph=True)
    loss = sk.fused_svr_loss(audio, inputs.text, 0.1)
    total = loss + slope.square().sum()
    ours = torch.autograd.grad(loss, tower.weight, retain_graph=True)[0]
    penalty = torch.autograd.grad(slope.square().sum(), tower.weight, retain_graph=True)[0]
    (whole,) = torch.autograd.grad(total, tower.weight, create_graph=True)
    difference = whole.detach() - ours - penalty
    assert difference.norm() <= 1e-12 * whole.detach().norm()


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_upstream_gradient_per_row(objective):
    """`none` with rows of ones over N is `mean`; one row alone is that row's own terms."""
    case = Case(N=33, dtype=torch.float64, radius="row", options={"objective": objective})
    inputs = make_inputs(case)
    leaves = leaves_of(inputs)
    arguments = dict(zip(inputs.differentiable(), leaves, strict=True))
    rows = sk.fused_svr_loss(**arguments, reduction="none", **case.options)
    mean = torch.autograd.grad(sk.fused_svr_loss(**arguments, **case.options), leaves)
    even = torch.autograd.grad(rows, leaves, torch.full((33,), 1 / 33).double(), retain_graph=True)
    for x, y in zip(even, mean, strict=True):
        assert (x - y).norm() <= 1e-7 * y.norm()  # 1/33 was rounded to float32
    for upstream in (torch.eye(33).double()[7], torch.ones(()).double().expand(33)):
        check_upstream = torch.autograd.grad(rows, leaves, upstream, retain_graph=True)
        spec = sk.svr_loss_reference(**arguments, reduction="none", **case.options)
        for x, y in zip(check_upstream, torch.autograd.grad(spec, leaves, upstream), strict=True):
            assert (x - y).norm() <= 1e-12 * y.norm()


@pytest.mark.parametrize("layout", ["transposed", "offset", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layout_does_not_matter(layout, dtype):
    case = Case(N=70, dtype=dtype, radius="row")
    plain = fused(case, make_inputs(case))
    assert same(fused(case, make_inputs(replace(case, layout=layout))), plain)


def test_expanded_and_reversed_inputs():
    inputs = make_inputs(Case(N=20))
    row = inputs.audio[:1].expand(20, -1)
    assert torch.equal(
        sk.fused_svr_loss(row, inputs.text, 0.1), sk.fused_svr_loss(row.clone(), inputs.text, 0.1)
    )
    radius = torch.tensor(0.1, requires_grad=True)
    sk.fused_svr_loss(inputs.audio, inputs.text, radius.expand(20)).backward()
    first, radius.grad = radius.grad, None
    sk.fused_svr_loss(inputs.audio, inputs.text, radius).backward()
    assert (first - radius.grad).abs() <= 1e-6 * first.abs()


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
    assert list(static) == ["radius.radius"] and static["radius.radius"].shape == ()
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
    """What `ops.svr_loss` returns without stats is an empty tensor, never an uninitialised one."""
    inputs = make_inputs(Case())
    tensors = OpInputs(inputs.audio, inputs.text, None, inputs.logit_scale, None, None, None)
    loss, stats = ops.svr_loss(tensors, Options())
    assert loss.shape == () and stats.shape == (0,)


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
