"""Every error of the interface, and what it says."""

import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from interface_cases import META, A, D, N, T, rows

import supclap_kernels as sk
from supclap_kernels import direct, native, ops

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
    (
        "radius module",
        {"radius": torch.nn.Identity()},
        TypeError,
        ["radius is a module", "Identity", "SVRLoss(radius=...)", "(audio, text, logit_scale)"],
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
    ("group", {"group": object()}, TypeError, ["group", "process group", "object"]),
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
    direct.forget()
    assert sk.available_backends()["cpu"] == sk.available_backends()["cuda"] == reason
    assert sk.explain() == f"reference: fallback: {reason}"
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        sk.fused_svr_loss(A, T, backend="cpu")
    assert torch.equal(sk.fused_svr_loss(A, T, 0.1), sk.svr_loss_reference(A, T, 0.1))
    direct.forget()


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
    with pytest.raises(ValueError, match="N must be positive and below .*, got 0"):
        sk.memory_estimate(0, 4)
    with pytest.raises(ValueError, match="D must be positive and below .*, got -1"):
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


@pytest.mark.parametrize("name", ["objective", "bilateral", "reduction"])
def test_the_specification_refuses_unknown_options_too(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .* got 'both'"):
        sk.svr_loss_reference(A, T, 0.1, **{name: "both"})
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        sk.memory_estimate(8, 8, **{name: "both"})


def test_explain_and_diagnostics_refuse_unknown_names():
    with pytest.raises(ValueError, match="backend must be one of .* got 'tpu'"):
        sk.explain("cpu", "tpu")
    with pytest.raises(ValueError, match="objective must be one of"):
        sk.force_decomposition(A, T, objective="clip")
    with pytest.raises(TypeError, match="float dtype"):
        sk.memory_estimate(8, 8, torch.int64)
