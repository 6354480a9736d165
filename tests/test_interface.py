"""The public interface: names, defaults, every error and what it says, and the value facts."""

import inspect
import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import supclap_kernels as sk
from supclap_kernels import dispatch, native, ops
from supclap_kernels.testing import Case, check

N, D = 6, 5
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def rows(n: int = N, d: int = D, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)


A, T = rows(seed=1), rows(seed=2)
META = torch.empty(N, D, device="meta")


def close(x: Tensor, y: Tensor, bound: float) -> bool:
    """Whether |x - y| <= bound |y|, in float64."""
    x, y = x.double(), y.double()
    return bool((x - y).norm() <= bound * y.norm())


# ------------------------------------------------------------------------------------ the interface

SIGNATURE = {
    "audio": inspect.Parameter.empty,
    "text": inspect.Parameter.empty,
    "radius": None,
    "logit_scale": 1 / 0.07,
    "logit_bias": None,
    "objective": "infonce",
    "bilateral": "mirror",
    "alpha": 1.0,
    "beta": 0.0,
    "normalize": False,
    "renormalize": False,
    "ids": None,
    "weight": None,
    "reduction": "mean",
    "group": None,
    "exchange": "gather",
    "workspace": 256 * 2**20,
    "backend": "auto",
    "return_stats": False,
}
POSITIONAL = ("audio", "text", "radius", "logit_scale", "logit_bias")


def test_every_public_name_exists():
    assert len(sk.__all__) == len(set(sk.__all__))
    for name in sk.__all__:
        assert getattr(sk, name) is not None
    documented = {"fused_svr_loss", "svr_loss_reference", "SVRLoss", "StaticRadius"}
    documented |= {"DynamicRadius", "SVRStats", "force_decomposition", "memory_estimate"}
    assert documented | {"available_backends"} <= set(sk.__all__)
    assert sk.__version__


def test_defaults_are_the_documented_ones():
    parameters = inspect.signature(sk.fused_svr_loss).parameters
    assert {name: p.default for name, p in parameters.items()} == SIGNATURE
    assert list(parameters) == list(SIGNATURE)
    for name, p in parameters.items():
        positional = p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert positional == (name in POSITIONAL), name


def test_the_reference_takes_the_same_arguments():
    fused = inspect.signature(sk.fused_svr_loss).parameters
    spec = inspect.signature(sk.svr_loss_reference).parameters
    assert [(p.name, p.kind) for p in spec.values()] == [(p.name, p.kind) for p in fused.values()]
    for name in fused.keys() - {"workspace", "backend"}:
        assert spec[name].default == fused[name].default, name


def test_the_module_and_the_diagnostics_share_the_defaults():
    module = inspect.signature(sk.SVRLoss).parameters
    options = set(SIGNATURE) - {"audio", "text", "logit_scale", "logit_bias", "ids", "weight"}
    assert set(module) == options
    forces = inspect.signature(sk.force_decomposition).parameters
    for parameters in (module, forces):
        for name, p in parameters.items():
            assert p.default == SIGNATURE[name], name
    forward = inspect.signature(sk.SVRLoss.forward).parameters
    assert list(forward)[1:] == ["audio", "text", "logit_scale", "logit_bias", "ids", "weight"]


def test_dynamic_radius_defaults():
    parameters = inspect.signature(sk.DynamicRadius).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "batch_size": None,
        "init": 0.1,
        "hidden": (256, 64),
        "features": "similarities",
        "detach_similarity": False,
    }
    assert inspect.signature(sk.StaticRadius).parameters["init"].default == 0.1


# --------------------------------------------------------------------------------------- the errors

ERRORS: list[tuple[str, dict[str, Any], type[Exception], list[str]]] = [
    (
        "shapes",
        {"audio": rows(N - 1)},
        ValueError,
        ["same shape (N, D)", "audio (5, 5)", "text (6, 5)"],
    ),
    (
        "widths",
        {"text": rows(N, D + 1)},
        ValueError,
        ["same shape (N, D)", "audio (6, 5)", "text (6, 6)"],
    ),
    (
        "dtypes",
        {"text": T.double()},
        TypeError,
        ["same dtype", "torch.float32", "torch.float64", "cast one"],
    ),
    ("devices", {"text": META}, ValueError, ["same device", "cpu", "meta"]),
    ("audio no tensor", {"audio": A.tolist()}, TypeError, ["audio must be a tensor", "list"]),
    ("text no tensor", {"text": None}, TypeError, ["text must be a tensor", "NoneType"]),
    ("audio ndim", {"audio": A[0]}, ValueError, ["audio must have shape (N, D)", "(5,)"]),
    ("text ndim", {"text": T[None]}, ValueError, ["text must have shape (N, D)", "(1, 6, 5)"]),
    (
        "no pairs",
        {"audio": A[:0], "text": T[:0]},
        ValueError,
        ["empty", "(0, 5)", "at least one"],
    ),
    ("no width", {"audio": A[:, :0], "text": T[:, :0]}, ValueError, ["empty", "(6, 0)"]),
    (
        "integers",
        {"audio": A.long(), "text": T.long()},
        TypeError,
        ["float32, float16, bfloat16 or float64", "torch.int64"],
    ),
    (
        "complex",
        {"audio": A.to(torch.complex64), "text": T.to(torch.complex64)},
        TypeError,
        ["float32, float16, bfloat16 or float64", "torch.complex64"],
    ),
    ("radius length", {"radius": torch.ones(N + 1)}, ValueError, ["radius", "(6,)", "(7,)"]),
    ("radius column", {"radius": torch.ones(N, 1)}, ValueError, ["radius", "(6,)", "(6, 1)"]),
    ("radius of one", {"radius": torch.ones(1)}, ValueError, ["radius", "0-d", "(6,)", "(1,)"]),
    (
        "radius integers",
        {"radius": torch.ones(N, dtype=torch.int32)},
        TypeError,
        ["radius must be", "torch.float32", "torch.int32"],
    ),
    (
        "radius integer",
        {"radius": torch.tensor(1)},
        TypeError,
        ["radius must be a float tensor", "torch.int64"],
    ),
    (
        "radius device",
        {"radius": torch.ones(N, device="meta")},
        ValueError,
        ["radius must be on cpu", "meta"],
    ),
    ("radius number", {"radius": "0.1"}, TypeError, ["radius must be a number", "0-d", "str"]),
    ("radius bool", {"radius": True}, TypeError, ["radius must be a number", "bool"]),
    ("radius list", {"radius": [0.1] * N}, TypeError, ["radius must be a number", "list"]),
    (
        "scale of one",
        {"logit_scale": torch.ones(1)},
        ValueError,
        ["logit_scale must be a number or a 0-d", "(1,)", ".squeeze()"],
    ),
    (
        "scale integer",
        {"logit_scale": torch.tensor(14)},
        TypeError,
        ["logit_scale must be a float tensor", "torch.int64"],
    ),
    (
        "scale device",
        {"logit_scale": torch.ones((), device="meta")},
        ValueError,
        ["logit_scale must be on cpu", "meta"],
    ),
    (
        "scale number",
        {"logit_scale": None},
        TypeError,
        ["logit_scale must be a number", "NoneType"],
    ),
    (
        "bias with infonce",
        {"logit_bias": -10.0},
        ValueError,
        ["logit_bias", "objective='siglip'", "InfoNCE", "pass None"],
    ),
    (
        "bias of one",
        {"logit_bias": torch.ones(1), "objective": "siglip"},
        ValueError,
        ["logit_bias must be a number or a 0-d", "(1,)", ".squeeze()"],
    ),
    (
        "bias number",
        {"logit_bias": "no", "objective": "siglip"},
        TypeError,
        ["logit_bias must be a number", "str"],
    ),
    (
        "objective",
        {"objective": "clip"},
        ValueError,
        ["objective must be one of 'infonce', 'siglip'", "'clip'"],
    ),
    (
        "bilateral",
        {"bilateral": True},
        ValueError,
        ["bilateral must be one of 'none', 'mirror', 'shared'", "True"],
    ),
    (
        "reduction",
        {"reduction": None},
        ValueError,
        ["reduction must be one of 'mean', 'sum', 'none'", "None"],
    ),
    (
        "exchange",
        {"exchange": "star"},
        ValueError,
        ["exchange must be one of 'gather', 'ring'", "'star'"],
    ),
    (
        "backend",
        {"backend": "tpu"},
        ValueError,
        ["backend must be one of 'auto', 'reference', 'cpu'", "'tpu'"],
    ),
    ("ids dtype", {"ids": torch.arange(N).int()}, TypeError, ["ids must be torch.int64", "int32"]),
    ("ids float", {"ids": torch.arange(N).float()}, TypeError, ["ids must be torch.int64"]),
    ("ids shape", {"ids": torch.arange(N)[:, None]}, ValueError, ["ids", "(6,)", "(6, 1)"]),
    ("ids length", {"ids": torch.arange(N - 1)}, ValueError, ["ids", "(6,)", "(5,)"]),
    ("ids list", {"ids": list(range(N))}, TypeError, ["ids must be a tensor", "(6,)", "list"]),
    (
        "ids device",
        {"ids": torch.zeros(N, dtype=torch.int64, device="meta")},
        ValueError,
        ["ids must be on cpu", "meta"],
    ),
    ("weight shape", {"weight": torch.ones(N, N)}, ValueError, ["weight", "(6,)", "(6, 6)"]),
    ("weight 0-d", {"weight": torch.tensor(1.0)}, ValueError, ["weight", "(6,)", "()"]),
    ("weight number", {"weight": 2.0}, TypeError, ["weight must be a tensor", "(6,)", "float"]),
    (
        "weight dtype",
        {"weight": torch.ones(N, dtype=torch.int64)},
        TypeError,
        ["weight must be torch.float32", "torch.int64"],
    ),
    (
        "weight device",
        {"weight": torch.ones(N, device="meta")},
        ValueError,
        ["weight must be on cpu", "meta"],
    ),
    (
        "alpha tensor",
        {"alpha": torch.tensor(1.0)},
        TypeError,
        ["alpha must be a Python number", "Tensor"],
    ),
    ("alpha text", {"alpha": "1"}, TypeError, ["alpha must be a Python number", "str"]),
    (
        "beta tensor",
        {"beta": torch.tensor(0.01)},
        TypeError,
        ["beta must be a Python number", "Tensor"],
    ),
    ("workspace sign", {"workspace": -1}, ValueError, ["workspace", "negative", "-1 bytes"]),
    ("workspace float", {"workspace": 2e8}, TypeError, ["workspace must be an int", "float"]),
    ("workspace bool", {"workspace": True}, TypeError, ["workspace must be an int", "bool"]),
    (
        "group",
        {"group": object()},
        NotImplementedError,
        ["group", "not implemented", "gather the embeddings"],
    ),
]


@pytest.mark.parametrize(
    ("changed", "error", "words"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS]
)
def test_what_does_not_fit_is_said_before_any_work(changed, error, words, monkeypatch):
    """The message holds what was given and what is needed; no backend and no choice is reached."""

    def work(*arguments: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(ops, "svr_loss", work)
    monkeypatch.setattr("supclap_kernels.loss.svr_loss_reference", work)
    arguments = {"audio": A, "text": T, **changed}
    with pytest.raises(error) as caught:
        sk.fused_svr_loss(**arguments)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


def test_the_same_arguments_unchanged_are_no_error():
    assert sk.fused_svr_loss(A, T).ndim == 0


def test_a_backend_that_cannot_run_says_why():
    states = sk.available_backends()
    off = [name for name, state in states.items() if state != "ok"]
    assert off
    for name in off:
        with pytest.raises(RuntimeError) as caught:
            sk.fused_svr_loss(A, T, backend=name)
        for part in (f"backend={name!r}", states[name], "Use backend='auto'"):
            assert part in str(caught.value)


def test_the_cpu_backend_refuses_other_devices():
    with pytest.raises(RuntimeError, match="backend='cpu' takes CPU tensors, got meta.*'auto'"):
        sk.fused_svr_loss(META, META, backend="cpu")


def test_without_the_compiled_module(monkeypatch):
    """auto falls back to the specification, 'cpu' says how to get the module."""
    reason = "the compiled module is missing (here); reinstall with `pip install -e .`"
    monkeypatch.setattr(native, "load", lambda: (None, reason))
    assert sk.available_backends()["cpu"] == sk.available_backends()["cuda"] == reason
    assert sk.explain() == f"reference: fallback: {reason}"
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        sk.fused_svr_loss(A, T, backend="cpu")
    assert torch.equal(sk.fused_svr_loss(A, T, 0.1), sk.svr_loss_reference(A, T, 0.1))


@pytest.mark.parametrize("radius", [0.1, torch.tensor(0.1), "static"])
def test_the_module_wants_a_module(radius):
    with pytest.raises(TypeError, match=r"radius must be a module.*StaticRadius\(0.1\).*got"):
        sk.SVRLoss(radius=radius)


@pytest.mark.parametrize("name", ["objective", "bilateral", "reduction", "exchange", "backend"])
def test_the_module_refuses_unknown_options_at_once(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'other'"):
        sk.SVRLoss(**{name: "other"})


def test_the_module_checks_the_embeddings_before_its_radius():
    module = sk.SVRLoss(radius=sk.DynamicRadius(N))
    with pytest.raises(ValueError, match=r"audio must have shape \(N, D\), got \(5,\)"):
        module(A[0], T, 10.0)


def test_dynamic_radius_errors():
    with pytest.raises(ValueError, match="'similarities' or 'summary', got 'rows'"):
        sk.DynamicRadius(N, features="rows")
    for size in (None, 0):
        with pytest.raises(ValueError, match=f"needs the batch size, got batch_size={size}.*summ"):
            sk.DynamicRadius(size)


def test_memory_estimate_errors():
    with pytest.raises(ValueError, match="N and D must be positive, got N=0, D=4"):
        sk.memory_estimate(0, 4)
    with pytest.raises(ValueError, match="N and D must be positive, got N=4, D=-1"):
        sk.memory_estimate(4, -1)
    with pytest.raises(TypeError):
        sk.memory_estimate(4, 4, colour="red")


BAD_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("audio", {"audio": A.clone().index_put_((torch.tensor(1),), torch.tensor(math.nan))}, "5"),
    ("text", {"text": torch.full_like(T, math.inf)}, "30"),
    ("radius", {"radius": torch.tensor([math.nan, 0, 0, 0, 0, -math.inf])}, "2"),
    ("logit_scale", {"logit_scale": math.nan}, "1"),
    ("weight", {"weight": torch.tensor([math.nan, 1, 1, 1, 1, 1])}, "1"),
    ("logit_bias", {"logit_bias": math.inf, "objective": "siglip"}, "1"),
]


@pytest.mark.parametrize(("name", "changed", "count"), BAD_VALUES)
def test_debug_finds_bad_values(name, changed, count, monkeypatch):
    """SUPCLAP_DEBUG=1 names the tensor and counts; without it nothing is raised."""
    arguments = {"audio": A, "text": T, **changed}
    monkeypatch.setenv("SUPCLAP_DEBUG", "1")
    with pytest.raises(ValueError, match=f"SUPCLAP_DEBUG: {name} has {count} .*NaN or infinite"):
        sk.fused_svr_loss(**arguments)
    for off in ("0", ""):
        monkeypatch.setenv("SUPCLAP_DEBUG", off)
        assert not torch.isfinite(sk.fused_svr_loss(**arguments))


def test_debug_finds_a_negative_scale(monkeypatch):
    monkeypatch.setenv("SUPCLAP_DEBUG", "1")
    with pytest.raises(ValueError, match=r"SUPCLAP_DEBUG: logit_scale is negative \(-2.0\)"):
        sk.fused_svr_loss(A, T, logit_scale=-2.0)
    with_checks = sk.fused_svr_loss(A, T, 0.1)
    monkeypatch.delenv("SUPCLAP_DEBUG")
    assert torch.isfinite(sk.fused_svr_loss(A, T, logit_scale=-2.0))
    assert torch.equal(with_checks, sk.fused_svr_loss(A, T, 0.1))


def test_debug_reads_the_environment_at_the_call():
    """Not at import: a running process can be debugged."""
    code = (
        "import os, torch, supclap_kernels as sk\n"
        "x = torch.full((2, 2), float('nan'))\n"
        "sk.fused_svr_loss(x, x)\n"
        "os.environ['SUPCLAP_DEBUG'] = '1'\n"
        "try: sk.fused_svr_loss(x, x)\n"
        "except ValueError: print('found')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "found\n", run.stderr


# --------------------------------------------------------------------------------------- the values


def l_orig(audio: Tensor, text: Tensor, k: float) -> Tensor:
    """InfoNCE as everyone writes it, in float64: the sum of both directions."""
    logits, labels = k * text.double() @ audio.double().t(), torch.arange(len(audio))
    return F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)


@pytest.mark.parametrize("n", [2, 37, 129])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_radius_it_is_the_plain_loss(n, backend):
    audio, text = rows(n, 16, torch.float64, 1), rows(n, 16, torch.float64, 2)
    loss = sk.fused_svr_loss(audio, text, logit_scale=9.0, backend=backend)
    assert close(loss, l_orig(audio, text, 9.0), 1e-14)


@pytest.mark.parametrize("options", [{}, {"objective": "siglip", "logit_bias": -3.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_and_beta_zero_is_the_plain_loss(options, dtype):
    """Exactly, gradients included; the radius then gets the gradient 0."""
    results = []
    for radius in (None, torch.full((37,), 0.2, dtype=dtype, requires_grad=True)):
        leaves = [rows(37, 16, dtype, seed).requires_grad_() for seed in (1, 2)]
        loss = sk.fused_svr_loss(*leaves, radius, alpha=0.0, beta=0.0, **options)
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert radius is not None and torch.equal(radius.grad, torch.zeros_like(radius))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("radius", [None, 0.1])
def test_one_pair_costs_nothing(backend, dtype, radius):
    for bilateral in ("none", "mirror", "shared"):
        leaves = [rows(1, 7, dtype, seed).requires_grad_() for seed in (1, 2)]
        loss = sk.fused_svr_loss(*leaves, radius, bilateral=bilateral, backend=backend)
        loss.backward()
        assert loss.item() == 0.0
        assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_one_pair_of_siglip():
    """softplus(-(k s + b)) for the base and both support vectors."""
    a, t = rows(1, 7, torch.float64, 1), rows(1, 7, torch.float64, 2)
    loss = sk.fused_svr_loss(a, t, 0.1, 5.0, -2.0, objective="siglip")
    r = (a - t).norm()
    u = (a - t) / r
    pairs = [(t, a), (t + 0.1 * u, a), (a - 0.1 * u, t)]
    wanted = sum(F.softplus(-(5.0 * (x * y).sum() - 2.0)) for x, y in pairs)
    assert close(loss, wanted, 1e-7)  # the smoothing of r


def test_siglip_without_bias_is_bias_zero():
    for backend in ("cpu", "reference"):
        options = {"objective": "siglip", "backend": backend}
        plain = sk.fused_svr_loss(A, T, 0.1, 7.0, **options)
        assert torch.equal(plain, sk.fused_svr_loss(A, T, 0.1, 7.0, 0.0, **options))
        assert not torch.equal(plain, sk.fused_svr_loss(A, T, 0.1, 7.0, -0.5, **options))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_float_scalar_and_rows_of_radius_agree(backend, dtype):
    audio, text = rows(37, 16, dtype, 1), rows(37, 16, dtype, 2)
    number = torch.float64 if dtype == torch.float64 else torch.float32
    radii = [0.25, torch.tensor(0.25), torch.full((37,), 0.25, dtype=number)]
    radii.append(torch.tensor(0.25, dtype=number).expand(37))
    losses = [sk.fused_svr_loss(audio, text, R, beta=0.1, backend=backend) for R in radii]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    ones = [sk.fused_svr_loss(audio, text, R, backend=backend) for R in (1, 1.0)]
    assert torch.equal(*ones) and not torch.equal(ones[0], losses[0])


def test_the_gradient_of_a_scalar_radius_is_the_sum_of_the_rows():
    audio, text = rows(37, 16, torch.float64, 1), rows(37, 16, torch.float64, 2)
    scalar = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    row = torch.full((37,), 0.25, dtype=torch.float64, requires_grad=True)
    for radius in (scalar, row):
        sk.fused_svr_loss(audio, text, radius).backward()
    assert scalar.grad.shape == () and row.grad.shape == (37,)
    assert close(scalar.grad, row.grad.sum(), 1e-14)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("other", FLOATS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dtypes(dtype, other, backend):
    """The loss in the accumulator's dtype, each gradient in its input's own."""
    leaves = [rows(37, 16, dtype, seed).requires_grad_() for seed in (1, 2)]
    leaves.append(torch.full((37,), 0.25, dtype=other, requires_grad=True))
    leaves += [torch.tensor(x, dtype=other, requires_grad=True) for x in (8.0, -3.0)]
    weight = torch.full((37,), 0.5, dtype=other)
    options: dict[str, Any] = {"objective": "siglip", "backend": backend, "return_stats": True}
    loss, stats = sk.fused_svr_loss(*leaves, weight=weight, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide and all(value.dtype == wide for value in stats)
    loss.backward()
    for leaf in leaves:
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
        assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0


def test_mixed_dtypes_give_the_right_gradients():
    """Values that every dtype holds exactly: only the gradients' rounding differs."""
    gradients = []
    for other in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        leaves = [rows(37, 16, torch.float32, seed).requires_grad_() for seed in (1, 2)]
        leaves.append(torch.full((37,), 0.25, dtype=other, requires_grad=True))
        leaves.append(torch.tensor(8.0, dtype=other, requires_grad=True))
        sk.fused_svr_loss(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
        for gradient, wanted in zip(gradients[-1], gradients[0], strict=True):
            # dk is summed in float64, so it is rounded once, from there.
            assert close(gradient, wanted, torch.finfo(gradient.dtype).eps + 1e-7)


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bilateral", ["none", "mirror", "shared"])
def test_ids_that_all_differ_change_nothing(objective, backend, bilateral):
    audio, text = rows(130, 16, seed=1), rows(130, 16, seed=2)
    options = {"objective": objective, "backend": backend, "bilateral": bilateral}
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for ids in (None, torch.randperm(130, generator=generator) * 2**40 - 2**45):
        leaves = [x.clone().requires_grad_() for x in (audio, text)]
        loss = sk.fused_svr_loss(*leaves, 0.1, ids=ids, **options)
        outputs.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*outputs, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bilateral", ["none", "mirror", "shared"])
def test_one_id_for_all_leaves_no_negative(backend, bilateral):
    leaves = [rows(130, 16, seed=seed).requires_grad_() for seed in (1, 2)]
    ids = torch.full((130,), 7)
    loss = sk.fused_svr_loss(*leaves, 0.1, ids=ids, bilateral=bilateral, backend=backend)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_equal_ids_count():
    """A pair of rows with one id is as if its logits were not there, and ids use all 64 bits."""
    ids = torch.tensor([0, 2**32, 2**33, 0, 5, -1])
    k, logits = 3.0, 3.0 * T.double() @ A.double().t()
    logits[0, 3] = logits[3, 0] = -math.inf
    labels = torch.arange(N)
    wanted = F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)
    loss = sk.fused_svr_loss(A.double(), T.double(), logit_scale=k, ids=ids)
    assert close(loss, wanted, 1e-14)


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reductions_are_sums_of_the_rows(objective, backend):
    audio, text = rows(37, 16, torch.float64, 1), rows(37, 16, torch.float64, 2)
    weight = torch.linspace(0.0, 2.0, 37, dtype=torch.float64)
    options = {"objective": objective, "backend": backend, "weight": weight, "beta": 0.1}
    none, total, mean = (
        sk.fused_svr_loss(audio, text, 0.1, reduction=reduction, **options)
        for reduction in ("none", "sum", "mean")
    )
    assert none.shape == (37,) and none[0] == 0.0
    assert close(none.sum(), total, 1e-14) and close(mean * 37, total, 1e-14)


def test_zero_weight_is_a_row_without_terms_but_with_negatives():
    weight = torch.ones(N, dtype=torch.float64)
    weight[2] = 0.0
    a, t = A.double(), T.double()
    whole = sk.fused_svr_loss(a, t, 0.1, reduction="none")
    part = sk.fused_svr_loss(a, t, 0.1, reduction="none", weight=weight)
    assert torch.equal(part, whole * weight)


def test_normalize_is_the_loss_of_normalised_rows():
    a, t = 3.0 * A.double(), 0.2 * T.double()
    loss = sk.fused_svr_loss(a, t, 0.1, normalize=True)
    assert close(loss, sk.fused_svr_loss(F.normalize(a, dim=1), F.normalize(t, dim=1), 0.1), 1e-14)
    assert not close(loss, sk.fused_svr_loss(a, t, 0.1), 1e-3)


@pytest.mark.parametrize(
    "number", [14, 14.0, torch.tensor(14.0), torch.nn.Parameter(torch.tensor(14.0))]
)
def test_numbers_and_tensors_of_scale_agree(number):
    loss = sk.fused_svr_loss(A, T, 0.1, number)
    assert torch.equal(loss.detach(), sk.fused_svr_loss(A, T, 0.1, 14.0))


def test_exchange_changes_nothing_on_one_rank():
    gather, ring = (sk.fused_svr_loss(A, T, 0.1, exchange=name) for name in ("gather", "ring"))
    assert torch.equal(gather, ring)


def test_return_stats_changes_neither_loss_nor_gradient():
    for alpha in (0.0, 1.0):
        outputs = []
        for stats in (False, True):
            leaves = [rows(37, 16, seed=seed).requires_grad_() for seed in (1, 2)]
            found = sk.fused_svr_loss(*leaves, 0.1, alpha=alpha, return_stats=stats)
            loss = found[0] if stats else found
            assert isinstance(loss, Tensor)
            assert not stats or isinstance(found[1], sk.SVRStats)
            outputs.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        values = zip(*outputs, strict=True)
        if alpha:
            assert all(torch.equal(x, y) for x, y in values)
        else:  # the support vectors are computed for the statistics only
            assert all(close(x, y, 1e-6) for x, y in values)


def test_the_loss_passes_the_rule():
    """One case under the acceptance rule, so that the facts above are facts about the loss."""
    check(sk.fused_svr_loss, Case(N=65, D=24, radius="row", weighted=True, duplicates=True))


# ------------------------------------------------------------------------------------- the backends


def test_available_backends():
    states = sk.available_backends()
    assert set(states) == set(dispatch.BACKENDS) - {"auto"}
    assert states["reference"] == "ok"
    assert all(isinstance(state, str) and state for state in states.values())


def test_explain_names_the_backend_and_the_reason():
    assert sk.explain("cpu", "reference") == "reference: asked for"
    assert re.fullmatch("cpu: .+", sk.explain())
    assert re.fullmatch("reference: fallback: no kernel for meta .+", sk.explain("meta"))
    assert sk.explain(torch.device("cpu")) == sk.explain("cpu")
    with pytest.raises(RuntimeError, match="backend='cpu' takes CPU tensors, got meta"):
        sk.explain("meta", "cpu")


def test_other_devices_run_on_the_specification():
    loss = sk.fused_svr_loss(META, META, 0.1)
    assert loss.device.type == "meta" and loss.shape == ()


def test_command_line_reports_every_backend():
    command = [sys.executable, "-m", "supclap_kernels"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[0].startswith(f"supclap_kernels {sk.__version__}, torch {torch.__version__}")
    for name, state in sk.available_backends().items():
        assert re.search(rf"^  {name} +{re.escape(state)}$", run.stdout, re.MULTILINE), name
    module = native.module()
    isas = ", ".join(module.isa_compiled)
    assert f"CPU kernels: {module.isa()} of {isas}" in lines
    assert f"CPU tensors run on {sk.explain('cpu')}" in lines
    assert any(re.fullmatch(r"threads: \d+ from \S+", line) for line in lines)
