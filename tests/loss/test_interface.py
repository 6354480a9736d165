"""The public interface: names, defaults, backends."""

import inspect
import re
import subprocess
import sys

import pytest
import torch
from interface_cases import META

import supclap_kernels as sk
from supclap_kernels import native
from supclap_kernels.options import CHOICES

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
    "renormalize": True,
    "ids": None,
    "weight": None,
    "reduction": "mean",
    "group": None,
    "exchange": "gather",
    "workspace": 256 * 2**20,
    "backend": "auto",
    "return_stats": False,
    "negatives": None,
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
    options -= {"negatives"}
    assert set(module) == options
    forces = inspect.signature(sk.force_decomposition).parameters
    for parameters in (module, forces):
        for name, p in parameters.items():
            assert p.default == SIGNATURE[name], name
    forward = inspect.signature(sk.SVRLoss.forward).parameters
    batch = ["audio", "text", "logit_scale", "logit_bias", "ids", "weight", "negatives"]
    assert list(forward)[1:] == batch


def test_dynamic_radius_defaults():
    parameters = inspect.signature(sk.DynamicRadius).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "batch_size": None,
        "init": 0.1,
        "hidden": (256, 64),
        "features": "similarities",
        "detach_similarity": False,
        "bound": "none",
    }
    assert inspect.signature(sk.StaticRadius).parameters["init"].default == 0.1


# ------------------------------------------------------------------------------------- the backends


def test_available_backends():
    states = sk.available_backends()
    assert set(states) == set(CHOICES["backend"]) - {"auto"}
    assert states["reference"] == "ok"
    assert all(isinstance(state, str) and state for state in states.values())


def test_explain_names_the_backend_and_the_reason():
    assert sk.explain("cpu", "reference") == "reference: asked for"
    assert re.fullmatch("cpu:small up to N = .+; then cpu:panel: .+", sk.explain())
    assert sk.explain(N=24).startswith("cpu:small: ")
    assert sk.explain(N=4096).startswith("cpu:panel: ")
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
