"""The benchmarks of a GPU, as far as a machine without one can run them."""

import csv
import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gate, run, timer
from bench.cases import GPU_PARTS, MODES, Case
from bench.inputs import make_large_inputs
from bench.peers import PEERS, Rival

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import bench
for module in pkgutil.walk_packages(bench.__path__, "bench."):
    if not module.name.endswith(("conftest", "test_cpu", "__main__")):
        importlib.import_module(module.name)
"""


def test_modules_need_no_triton():
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("part", GPU_PARTS)
def test_every_peer_of_every_case_is_built(part):
    cases, peers = GPU_PARTS[part]
    assert cases and set(peers) <= set(PEERS)
    for mode in {case.mode for case in cases}:
        for peer in peers:
            assert isinstance(PEERS[peer].state(mode), str)
            assert callable(PEERS[peer].build(mode))


@pytest.mark.parametrize("peer", ["eager", "ours", "linear_cross_entropy"])
@pytest.mark.parametrize("mode", MODES)
def test_peers_pass_the_gate(mode, peer):
    """Every mode's formula is that of the specification."""
    state = PEERS[peer].state(mode)
    if state == "ok":
        assert gate.violations(PEERS[peer].build(mode), Case(mode, 64, 48)) == []
    else:
        assert isinstance(PEERS[peer], Rival)


@pytest.mark.parametrize("N", [100, 5000])
def test_large_inputs(N):
    """As many rows as asked for, of length 1, none twice."""
    inputs = make_large_inputs(Case("siglip-plain", N, 32, "bfloat16"), "cpu")
    assert inputs.radius is None and inputs.logit_bias is not None
    for rows in (inputs.audio, inputs.text):
        assert rows.shape == (N, 32) and rows.dtype == torch.bfloat16
        assert len(rows.unique(dim=0)) == N
        assert float((rows.float().norm(dim=1) - 1).abs().max()) < 0.01


@pytest.fixture
def without_device(monkeypatch):
    """The code of a GPU's table on CPU tensors, with a timer that always says 2 ms."""
    on_cpu = functools.partial(make_large_inputs, device="cpu")
    monkeypatch.setattr(run, "make_large_inputs", on_cpu)
    violations = gate.violations
    monkeypatch.setattr(gate, "violations", lambda loss, case, _: violations(loss, case))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timer, "gpu_peak_mib", lambda step: float(len(step.both())))
    monkeypatch.setattr(timer, "replayed", lambda call: call)
    monkeypatch.setattr(timer, "wall_ms", lambda *_: 2.0)
    monkeypatch.setattr(timer, "event_ms", lambda *_: 2.0)


def table(path: Path, part: str, case: Case, peers: list[str]) -> dict[str, dict[str, str]]:
    run.run_gpu(part, path, [case], peers)
    with (path / f"{part}.csv").open() as file:
        return {row.pop("peer"): row for row in csv.DictReader(file)}


def test_matrix(without_device, tmp_path, monkeypatch):
    """A peer that cannot run has no row; one that fails, a row without numbers."""
    monkeypatch.setitem(PEERS, "memeff", replace(PEERS["memeff"], loss=lambda *_: None))
    monkeypatch.setitem(PEERS, "memeff", replace(PEERS["memeff"], installed=True))
    peers = ["eager", "auto", "cuda:hopper", "linear_cross_entropy", "memeff"]
    rows = table(tmp_path, "large", Case("infonce", 200, 32), peers)
    assert set(rows) == set(peers) - {"cuda:hopper"}
    numbers = {"forward_ms": "2", "both_ms": "2", "extra_mib": "3", "rounds": "11"}
    place = {"mode": "infonce", "N": "200", "D": "32", "dtype": "float32"}
    assert rows["auto"] == {**place, **numbers, "gate": "passed"}
    assert rows["eager"] == {**place, **numbers, "gate": "not applied"}
    assert rows["memeff"]["gate"].startswith("not applied; failed: ")
    assert rows["memeff"]["both_ms"] == ""
    assert (tmp_path / "env.json").is_file()


def test_latency(without_device, tmp_path):
    rows = table(tmp_path, "latency", Case("mirror", 24, 32, "bfloat16"), ["eager", "auto"])
    place = {"mode": "mirror", "N": "24", "D": "32", "dtype": "bfloat16"}
    numbers = {"python_us": "2000", "graph_us": "2000"}
    assert rows["auto"] == {**place, **numbers, "gate": "passed"}
    assert rows["eager"] == {**place, **numbers, "gate": "not applied"}


def test_turns():
    """Every round starts with another one; a budget leaves three samples at least."""
    order = []
    samplers = {name: lambda name=name: order.append(name) or 5.0 for name in "abc"}
    samples = timer.interleave(samplers, 4, budget=1.0)
    assert order == [*"abc", *"bca", *"cab"]
    assert all(spent == [5.0] * 3 for spent in samples.values())
