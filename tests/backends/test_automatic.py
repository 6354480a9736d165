"""What runs which call: backend="auto" on machines that need not be here, and every way by name."""

import contextlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import supclap_kernels as sk
from supclap_kernels import automatic, direct, dispatch, native, ops, selfcheck, tables
from supclap_kernels.backends import available, machine
from supclap_kernels.backends.call import Tensors
from supclap_kernels.backends.estimate import MARGIN, SHARE, Kind, eager_bytes, seconds
from supclap_kernels.backends.machine import described
from supclap_kernels.options import MIRROR, ONE_SIDED, PLAIN, SHARED, WAYS, Options

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "h200"
HALF, SINGLE = torch.bfloat16, torch.float32
MODES = [(mode, True) for mode in (PLAIN, ONE_SIDED, SHARED, MIRROR)]
MODES += [(mode, False) for mode in (PLAIN, ONE_SIDED, MIRROR)]


@pytest.fixture
def two_gpus(monkeypatch):
    """As if there were two GPUs, the second one of Hopper, and everything were built."""
    launchers = SimpleNamespace(
        hopper_tile=None,
        CudaProblem=SimpleNamespace,
        single_limit=lambda problem, side: 100,
        architectures=lambda: ["80", "90a", "90+PTX"],
    )
    monkeypatch.setattr(available, "triton", lambda: "ok")
    monkeypatch.setattr(available, "cuda", lambda: "ok")
    monkeypatch.setattr(available, "capability", lambda index: (9, 0) if index == 1 else (8, 0))
    monkeypatch.setattr(machine, "card_at", lambda i: machine.CARDS[available.capability(i)])
    monkeypatch.setattr(machine, "free_memory", lambda index: 40 * 2**30)
    monkeypatch.setattr(native, "cuda", lambda: launchers)
    monkeypatch.setattr(native, "has_device", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(automatic.tables, "load", lambda device: None)
    monkeypatch.setattr(selfcheck, "CHECKED", {})
    direct.forget()
    yield launchers
    direct.forget()


def ways(backend: str, device: str, dtype: torch.dtype, mode: int, **more) -> dict[str, int | None]:
    routes = dispatch.routes(backend, torch.device(device), Kind(64, dtype, mode, True), **more)
    return {route.way: route.largest for route in routes}


# ------------------------------------------------------------------------- by the table of an H200


def test_auto_takes_what_was_measured(two_gpus):
    """On Hopper the CUDA kernels, and Triton's for large batches of the plain InfoNCE."""
    assert ways("auto", "cuda:1", HALF, MIRROR) == {"cuda:single": 100, "cuda:hopper": None}
    assert ways("auto", "cuda:1", HALF, PLAIN) == {"cuda:single": 100, "triton:tile": None}
    assert list(ways("auto", "cuda:1", SINGLE, PLAIN)) == ["cuda:single", "reference", "cuda:panel"]
    assert ways("cuda", "cuda:1", HALF, PLAIN) == {"cuda:single": 100, "cuda:panel": None}
    assert ways("auto", "cuda:1", torch.float64, MIRROR) == {"reference": None}
    del two_gpus.hopper_tile  # compiled for other targets
    assert list(ways("auto", "cuda:1", HALF, MIRROR)) == ["cuda:single", "reference", "cuda:panel"]


def test_every_way_has_a_name(two_gpus):
    for name in WAYS:
        if name.startswith("cpu"):
            continue
        largest = 100 if "single" in name else None
        assert ways(name, "cuda:1", HALF, MIRROR) == {name: largest}
    assert ways("panel", "cuda:0", SINGLE, MIRROR) == {"cuda:panel": None}
    assert ways("triton", "cuda:0", SINGLE, MIRROR) == {"triton:tile": None}
    with pytest.raises(RuntimeError, match="no Hopper GPU"):
        ways("cuda:hopper", "cuda:0", HALF, MIRROR)
    with pytest.raises(RuntimeError, match="takes float16 and bfloat16"):
        ways("cuda:hopper", "cuda:1", SINGLE, MIRROR)


def test_a_group_takes_no_single_launch_and_no_eager_pytorch(two_gpus):
    assert ways("auto", "cuda:1", HALF, MIRROR, staged=True) == {"cuda:hopper": None}
    assert ways("auto", "cuda:0", SINGLE, MIRROR, staged=True) == {"cuda:panel": None}
    with pytest.raises(RuntimeError, match="one launch for the batch of one process"):
        ways("cuda:single", "cuda:1", HALF, MIRROR, staged=True)


def test_explain_names_the_way_of_a_call(two_gpus):
    call = {"device": "cuda:1", "dtype": HALF, "D": 64}
    assert sk.explain(**call, N=24).startswith("cuda:single: ")
    assert sk.explain(**call, N=101).startswith("cuda:hopper: ")
    assert sk.explain(**call, N=101, radius=False).startswith("triton:tile: ")
    assert sk.explain(**call).startswith("cuda:single up to N = 100: one launch")
    assert "; then cuda:hopper: measured fastest on an H200" in sk.explain(**call)
    assert "by model" in sk.explain(**{**call, "dtype": SINGLE}, N=4096)
    assert sk.explain(**call, N=24).endswith("; checked here when it is first used")


def test_kernels_run_only_on_targets_they_were_compiled_for(two_gpus):
    two_gpus.architectures = lambda: ["80", "90a", "100", "90+PTX"]
    fits = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0)]
    assert all(available.compiled_for(capability) for capability in fits)
    assert not available.compiled_for((7, 5))
    two_gpus.architectures = lambda: ["86", "90a"]
    assert [x for x in fits if available.compiled_for(x)] == [(8, 6), (8, 9), (9, 0)]
    two_gpus.architectures = lambda: ["100a"]  # for that very chip
    assert available.compiled_for((10, 0)) and not available.compiled_for((10, 3))
    assert "not built for compute capability 8.0" in available.state("cuda", 0)
    assert available.state("panel", 0) == "ok"  # Triton's
    assert "cuda" not in " ".join(ways("auto", "cuda:0", HALF, MIRROR))


# ----------------------------------------------------------------------------------------- by model

MACHINES = [
    ((8, 0), ("cuda", "triton")),
    ((8, 9), ("cuda", "triton")),
    ((9, 0), ("triton",)),
    ((10, 0), ("cuda", "triton")),
    ((8, 6), ("triton",)),
    ((12, 0), ("cuda",)),
]


@pytest.mark.parametrize("capability, built", MACHINES)
@pytest.mark.parametrize("mode, infonce", MODES)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_auto_is_eager_only_where_model_and_memory_say_so(capability, built, mode, infonce, dtype):
    options = {
        "objective": "infonce" if infonce else "siglip", "radius": mode != PLAIN, "dtype": dtype,
        "bilateral": {SHARED: "shared", MIRROR: "mirror"}.get(mode, "none"),
    }  # fmt: skip
    kind = Kind(512, dtype, mode, infonce)
    for N, memory in itertools.product((24, 256, 1024, 4096, 65536), (None, 2**20)):
        there = described(capability, built, memory)
        says = sk.explain(N=N, capability=capability, built=built, memory=memory, **options)
        way = says.partition(": ")[0]
        able = automatic.candidates(there, kind, staged=False).at(N)
        able = [x for x in able if not (there.cuda and x == "triton:tile")]
        fastest = min(seconds(there, x, N, kind) for x in able)
        faster = MARGIN * fastest <= seconds(there, "reference", N, kind)
        fits = eager_bytes(N, kind.directions) <= SHARE * there.free
        if way == "reference":
            assert fits and not faster and automatic.EAGER in says, says
        else:
            assert way in able, says
            assert says.count(automatic.BY_MODEL if faster else automatic.BY_MEMORY) == 1, says
        assert f"model of {there.card.name}" in says and "that are free" in says


def test_what_users_of_such_cards_get():
    half = {"dtype": HALF, "bilateral": "none"}
    for capability in ((8, 0), (8, 9), (10, 0)):
        assert sk.explain(N=24, capability=capability, **half).startswith("cuda:single: by model")
        for N in (4096, 65536):
            assert sk.explain(N=N, capability=capability, **half).startswith("cuda:panel: by model")
    without = {"capability": (9, 0), "built": ("triton",), **half}
    assert sk.explain(N=24, **without).startswith("reference: by model no kernel")
    assert sk.explain(N=4096, **without).startswith("triton:tile: by model")
    assert sk.explain(N=4096, capability=(7, 5)).startswith("reference: the kernels need compute")
    assert sk.explain(N=4096, capability=(8, 0), built=()).startswith(
        "reference: fallback: neither"
    )
    assert sk.explain(capability=(8, 0), dtype=torch.float64).startswith("reference: float64")
    middle = {"capability": (8, 0), "N": 1024}
    assert sk.explain(**middle).startswith(f"reference: {automatic.EAGER}")
    assert sk.explain(**middle, memory=2**25).startswith(f"cuda:panel: {automatic.BY_MEMORY}")
    with pytest.raises(ValueError, match="name its compute capability"):
        sk.explain(built=("triton",))
    with pytest.raises(ValueError, match="built is a list that may name"):
        sk.explain(capability=(8, 0), built=("nvcc",))


def test_the_model_knows_the_h200():
    """Within 40 % of the time that kernels ran; where it waits for the host, between that and the
    whole step."""
    there = described((9, 0))
    peers = {"cuda": "cuda:panel", "panel": "triton:panel", "triton-128MiB": "triton:tile"}
    modes = {"infonce": PLAIN, "one-sided": ONE_SIDED, "mirror": MIRROR, "siglip": ONE_SIDED}
    compared = 0
    for row in json.loads((RESULTS / "kernels.json").read_text()):
        if row.get("peer") not in peers:
            continue
        kind = Kind(row["D"], HALF, modes[row["mode"]], row["mode"] != "siglip")
        model = 1e3 * seconds(there, peers[row["peer"]], row["N"], kind)
        assert 0.6 * row["running_ms"] <= model <= 1.4 * row["step_ms"], (row["mode"], row["peer"])
        compared += 1
    assert compared == 11


# ----------------------------------------------------------------------------------- the self-check


def call_on(device: str, N: int = 24) -> Tensors:
    audio = SimpleNamespace(
        shape=(N, 64), is_cuda=True, device=torch.device(device), dtype=HALF, __len__=lambda: N
    )
    audio = type("Audio", (), {**vars(audio), "__len__": lambda self: N})()
    return Tensors(audio, audio, torch.tensor(0.1), torch.tensor(1.0), None, None, None)


@pytest.mark.parametrize("mode, infonce", MODES)
@pytest.mark.parametrize("dtype", [HALF, torch.float16, SINGLE, torch.float64])
def test_the_self_check_accepts_what_is_right(mode, infonce, dtype):
    for way, rows in (("cpu:small", 96), ("cpu:panel", 200)):
        backend = dispatch.implementation(way)
        kind = Kind(0, dtype, mode, infonce)
        assert selfcheck.failure(backend, torch.device("cpu"), kind, rows) == ""


class Wrong:
    """A backend with one row of the audio's gradient 1 % too large, or that cannot run."""

    def __init__(self, error: Exception | None = None) -> None:
        self.right, self.error = dispatch.implementation("cpu:small"), error

    def forward(self, *arguments):
        if self.error is not None:
            raise self.error
        return self.right.forward(*arguments)

    def backward(self, *arguments):
        audio, *others = self.right.backward(*arguments)
        audio[7] *= 1.01
        return audio, *others


@pytest.mark.parametrize("error", [None, RuntimeError("no kernel image")], ids=str)
def test_a_way_that_fails_is_warned_of_once(monkeypatch, error):
    monkeypatch.setattr(selfcheck, "CHECKED", {})
    kind, device, backend = Kind(0, SINGLE, MIRROR, True), torch.device("cpu"), Wrong(error)
    with pytest.warns(UserWarning, match="cuda:single failed its self-check") as found:
        assert not selfcheck.trusted("cuda:single", backend, device, kind)
        assert not selfcheck.trusted("cuda:single", backend, device, kind)
    assert len(found) == 1
    wanted = "audio: worst row error" if error is None else "RuntimeError: no kernel image"
    assert wanted in str(found[0].message)
    assert "failed" in selfcheck.checked("cuda:single", device, kind)
    assert selfcheck.trusted("cpu:small", dispatch.implementation("cpu:small"), device, kind)
    assert selfcheck.checked("cpu:small", device, kind) == "checked here"


def test_auto_proves_a_way_before_it_is_used(two_gpus, monkeypatch):
    seen = []

    def failure(backend, device, kind, rows):
        seen.append((device, kind.mode, rows))
        return "" if device.index == 1 else "all wrong"

    monkeypatch.setattr(selfcheck, "failure", failure)
    options = Options(bilateral="none")
    assert not dispatch.runs_reference(call_on("cuda:1"), options)
    assert not dispatch.runs_reference(call_on("cuda:1"), options)
    assert not dispatch.runs_reference(call_on("cuda:1", 5000), options)
    assert [rows for *_, rows in seen] == [96, 200]  # one launch, then panels; each once
    assert not dispatch.runs_reference(call_on("cuda:0"), options._replace(backend="cuda"))
    assert len(seen) == 2  # who names a backend gets it
    with pytest.warns(UserWarning, match="all wrong"):
        assert dispatch.runs_reference(call_on("cuda:0"), options)
    assert dispatch.runs_reference(call_on("cuda:0"), options)
    with pytest.raises(RuntimeError, match="a compiled call cannot change its backend"):
        dispatch.refuse_unproven(call_on("cuda:0"), options)
    dispatch.refuse_unproven(call_on("cuda:1"), options)


def test_nothing_is_proven_while_a_graph_is_captured(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(selfcheck, "failure", lambda *_: pytest.fail("checked"))
    options, call = Options(), call_on("cuda:1")
    assert dispatch.runs_reference(call, options)  # eager PyTorch, until it was proven
    dispatch.refuse_unproven(call, options)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(selfcheck, "failure", lambda *_: "")
    assert not dispatch.runs_reference(call, options)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not dispatch.runs_reference(call, options)


def test_an_operator_depends_on_what_is_installed_alone(two_gpus, monkeypatch):
    """It is never eager PyTorch, and its choice, which compiled programs contain, is the same with
    little memory, other settings and a table of `tune`."""

    def of_operators() -> list[tuple[str, int | None]]:
        dispatch.remembered_kernels.cache_clear()
        return [(x.way, x.largest) for x in dispatch.remembered_kernels(call)]

    kind = Kind(512, SINGLE, MIRROR, True)
    call = dispatch.Remembered("auto", torch.device("cuda:0"), kind, False, 1)
    assert "reference" in [x.way for x in dispatch.remembered_routes(call)]
    kernels = of_operators()
    assert kernels == [("cuda:single", 100), ("cuda:panel", None)]
    monkeypatch.setattr(machine, "free_memory", lambda index: 2**20)
    monkeypatch.setattr(machine, "tf32_allowed", lambda: True)
    table = tables.Table({"float32 mirror infonce": tables.Measured((24,), ({"reference": 1.0},))})
    monkeypatch.setattr(automatic.tables, "load", lambda device: table)
    assert of_operators() == kernels


def test_the_self_check_leaves_no_trace(monkeypatch):
    """Random numbers, gradients of others, autocast and inference mode stay as they are."""
    monkeypatch.setattr(selfcheck, "CHECKED", {})
    backend, kind = dispatch.implementation("cpu:panel"), Kind(0, SINGLE, ONE_SIDED, True)
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert selfcheck.trusted("cpu:panel", backend, torch.device("cpu"), kind)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(state, torch.get_rng_state())
    assert ops.watched(Tensors(*[torch.zeros(1)] * 7)) is False


@pytest.mark.parametrize(
    "call, error",
    [
        ({"D": 0}, "D must be positive and below"),
        ({"D": 2**40}, "D must be positive and below"),
        ({"N": 0}, "N must be positive and below"),
        ({"N": 1.5}, "N must be a number of rows or columns, got 1.5"),
        ({"dtype": torch.int64}, "dtype must be the embeddings' float dtype"),
        ({"capability": [8, 0]}, "capability must be two numbers such as"),
        ({"capability": (8,)}, "capability must be two numbers such as"),
        ({"built": "cuda"}, "built is a list that may name"),
        ({"memory": -1}, "memory must not be negative"),
        ({"device": "mps"}, "capability asks what 'auto' takes"),
        ({"backend": "cuda"}, "capability asks what 'auto' takes"),
    ],
    ids=str,
)
def test_explain_refuses_what_describes_no_call(call, error):
    """Some of these once ended the process, in the native module."""
    with pytest.raises((TypeError, ValueError), match=error):
        sk.explain(**{"capability": (8, 0), **call})
