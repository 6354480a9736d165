"""`tune`: what it measures, and what "auto" does with it and with tables of other machines."""

import json
import re
import subprocess
import sys

import pytest
import torch

import supclap_kernels as sk
from supclap_kernels import automatic, direct, dispatch, selfcheck, tables, tuning
from supclap_kernels.backends.estimate import Kind
from supclap_kernels.backends.machine import described
from supclap_kernels.options import MIRROR, ONE_SIDED, PLAIN, SHARED
from supclap_kernels.tables import Measured

CPU = torch.device("cpu")
TIMES = {"cpu:small": 3.0, "cpu:panel": 2.0, "reference": 1.0}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("SUPCLAP_CACHE", str(tmp_path))
    tables.load_from.cache_clear()
    direct.forget()
    yield tmp_path
    tables.load_from.cache_clear()
    direct.forget()


def written(**changes) -> None:
    """A table in which each larger way is slower, as if it had been measured here."""
    tables.save(CPU, {"float32 mirror infonce": {24: TIMES, 1024: {**TIMES, "cpu:panel": 0.5}}})
    path = tables.path_of(CPU)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
    direct.forget()


def test_tune_writes_what_auto_takes(cache, monkeypatch):
    monkeypatch.setitem(tuning.SIZES, "cpu", (8, 64))
    monkeypatch.setattr(tuning, "SETTLED", 0.0)
    lines = []
    path = sk.tune("cpu", report=lines.append)
    assert path == tables.path_of(CPU) and path.parent == cache
    assert len(lines) == 2 * len(tuning.KINDS)
    assert lines[0].startswith("float32 mirror infonce, N = 8: ")
    assert set(re.findall(r"(\S+) [\d.]+ ms", lines[0])) == {"reference", "cpu:small", "cpu:panel"}
    table = tables.load(CPU)
    for dtype, mode, infonce in tuning.KINDS:
        assert table.of(Kind(512, dtype, mode, infonce)).sizes == (8, 64)
    assert table.of(Kind(99, torch.float16, SHARED, True)).sizes == (8, 64)
    assert table.of(Kind(512, torch.float64, PLAIN, True)) is None
    times = table.of(Kind(512, torch.float32, MIRROR, True)).times[0]
    fastest = min(times, key=times.get)
    assert sk.explain(N=8).startswith(f"{fastest}: measured here by tune (at N = 8: {fastest} ")
    assert "measured here" not in sk.explain(N=8, backend="cpu")
    sk.fused_svr_loss(torch.randn(8, 16), torch.randn(8, 16), 0.1)
    assert tables.reset(CPU) and not tables.reset(CPU)


def test_tune_keeps_to_its_budget(cache, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(tuning, "KINDS", tuning.KINDS[:2])
    monkeypatch.setitem(tuning.SIZES, "cpu", (4,) * 100)
    lines = []
    sk.tune("cpu", budget=60, report=lines.append)
    assert 2 <= len(lines) < 40 and next(clock) < 150


def test_auto_takes_the_fastest(cache):
    written()
    assert sk.explain(N=24).startswith("reference: measured here by tune (at N = 24: ")
    assert sk.explain(N=1024).startswith("cpu:panel: measured here by tune (at N = 1024: ")
    assert sk.explain(N=24, bilateral="none").startswith("cpu:small: one native call")
    measured = "reference up to N = .+; then cpu:panel up to N = 2048: measured .+"
    assert re.fullmatch(f"{measured}; then cpu:panel: panels .+", sk.explain())
    X = torch.randn(24, 8, requires_grad=True)
    sk.fused_svr_loss(X, X, 0.1).backward(create_graph=True)
    assert X.grad.grad_fn is not None  # which eager PyTorch alone can do
    torch.autograd.grad(X.grad.sum(), X)


def test_a_compiled_call_is_no_eager_pytorch(cache):
    written()
    X = torch.randn(24, 8)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(sk.fused_svr_loss, backend=backend, fullgraph=True)(X, X, 0.1)
    assert "supclap_kernels.svr_loss" in str(graphs[0].code)


def test_a_compiled_program_does_not_depend_on_a_table(cache):
    """Compilers keep programs on disk, with the sizes of what an operator saves."""
    X, Y = (torch.randn(24, 8, requires_grad=True) for _ in range(2))
    compiled = torch.compile(sk.fused_svr_loss, backend="aot_eager", fullgraph=True)
    first = torch.autograd.grad(compiled(X, Y, 0.1), X)[0]
    tables.save(CPU, {"float32 mirror infonce": {24: {"cpu:panel": 1.0, "cpu:small": 2.0}}})
    direct.forget()
    assert sk.explain(N=24).startswith("cpu:panel: measured here")
    assert torch.equal(torch.autograd.grad(compiled(X, Y, 0.1), X)[0], first)


def test_another_number_of_threads_is_another_choice(cache):
    written()
    X, before = torch.randn(24, 8, requires_grad=True), torch.get_num_threads()
    assert "Direct" not in type(sk.fused_svr_loss(X, X, 0.1).grad_fn).__name__
    try:
        torch.set_num_threads(before + 1)
        assert "Direct" in type(sk.fused_svr_loss(X, X, 0.1).grad_fn).__name__
    finally:
        torch.set_num_threads(before)
    assert "Direct" not in type(sk.fused_svr_loss(X, X, 0.1).grad_fn).__name__


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"made_for": {}}, "device, torch, triton, cuda, build changed"),
        ({"milliseconds": {"x": {"24": {"cpu:small": -1.0}}}}, "times of 'x' are no positive"),
        ({"milliseconds": {"x": {"24": {"cpu:small": True}}}}, "times of 'x' are no positive"),
        ({"milliseconds": {"x": {"24": {"cpu:small": float("inf")}}}}, "times of 'x' are no"),
        ({"milliseconds": {"x": {"24": {"cpu:small": 10**400}}}}, "it is broken"),
        ({"milliseconds": {"x": {f"1{'0' * 400}": {"cpu:small": 1}}}}, "sizes of 'x' are out"),
        ({"milliseconds": {"x": {"24 ": {"cpu:small": 1}}}}, "sizes of 'x' are no numbers"),
        ({"milliseconds": {"x": {"24": {}, "8": {}}}}, "sizes of 'x' are out of order"),
        ({"milliseconds": {"x": {}}}, "sizes of 'x' are no numbers"),
        ({"milliseconds": {"x": [1, 2]}}, "it is broken"),
        ({"milliseconds": None}, "it is broken"),
    ],
    ids=str,
)
def test_a_broken_or_foreign_table_is_ignored(cache, change, reason):
    written(**change)
    with pytest.warns(UserWarning, match=re.escape(reason)) as found:
        assert sk.explain(N=24).startswith("cpu:small: one native call")
    sk.explain(N=24, bilateral="none")
    assert len(found) == 1


def test_a_table_of_another_build_is_ignored(cache, monkeypatch):
    written()
    assert tables.load(CPU) is not None
    tables.load_from.cache_clear()
    monkeypatch.setattr(tables, "build", lambda: "another")
    with pytest.warns(UserWarning, match="build changed since it was made"):
        assert tables.load(CPU) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0", "null", "[" * 200_000], ids=range(7))
def test_a_file_that_is_no_table_is_ignored(cache, text):
    tables.path_of(CPU).write_text(text)
    with pytest.warns(UserWarning, match="it is broken"):
        assert tables.load(CPU) is None


def test_a_table_is_for_its_threads(cache):
    written()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert tables.load(CPU) is None
    finally:
        torch.set_num_threads(before)
    assert tables.load(CPU) is not None


def test_the_nearest_size_speaks():
    measured = Measured((16, 1024), ({"a": 1.0, "reference": 2.0}, {"a": 2.0, "reference": 1.0}))
    taken = [measured.fastest(N, ("a",), True).way for N in (1, 16, 127, 129, 1024, 2048)]
    assert taken == ["a", "a", "a", "reference", "reference", "reference"]
    assert measured.fastest(16, ("b",), True) is None
    assert measured.fastest(2049, ("a",), True) is None  # nothing near was measured
    assert measured.fastest(1024, ("a",), False).way == "a"


def test_what_was_not_measured_stays_as_it_is(cache):
    """Larger batches than those of the table, and rows without a kernel."""
    tables.save(CPU, {"float32 mirror infonce": {24: {"cpu:small": 1.0}, 64: {"reference": 1.0}}})
    direct.forget()
    assert sk.explain(N=24).startswith("cpu:small: measured here")
    assert sk.explain(N=64).startswith("cpu:small: one native call")
    assert sk.explain(N=4096).startswith("cpu:panel: panels with")
    tables.save(CPU, {"float32 mirror infonce": {24: {"reference": 2.0, "cpu:panel": 1.0}}})
    direct.forget()
    assert sk.explain(N=24).startswith("cpu:panel: measured here")
    assert sk.explain(N=100).startswith("cpu:small: one native call")


def test_the_numbers_are_those_that_decided(cache):
    fast, slow = {"cpu:panel": 1.0, "cpu:small": 2.0}, {"cpu:panel": 2.0, "cpu:small": 1.0}
    tables.save(CPU, {"float32 mirror infonce": {24: fast, 64: slow}})
    direct.forget()
    for N in range(1, 129):
        way, numbers = re.fullmatch(r"(\S+): .+ \(at N = \d+: (\S+) .+\)", sk.explain(N=N)).groups()
        assert way == numbers


def test_auto_takes_ways_that_no_model_knows():
    """`tune` has measured them."""
    times = {"triton:tile": 1.0, "triton:panel": 2.0, "cuda:panel": 3.0, "reference": 9.0}
    measured = Measured((24, 4096), (times, times))
    for capability in ((8, 0), (9, 0)):
        for mode in (PLAIN, MIRROR):
            kind = Kind(512, torch.bfloat16, mode, True)
            call = (described(capability), kind, False, measured, False)
            ways = {x.way for x in automatic.gpu_routes(*call) if x.reason == tables.HERE}
            assert ways == {"triton:tile"}
    beyond = automatic.gpu_routes(described((9, 0)), Kind(512, torch.bfloat16, MIRROR, True),
                                  False, measured, False)[-1]  # fmt: skip
    assert beyond.way == "cuda:hopper" and beyond.reason != tables.HERE


def test_a_home_that_cannot_be_looked_at(monkeypatch):
    """Containers run as users without one: no table, and no error."""
    with monkeypatch.context() as patch:
        for name in ("SUPCLAP_CACHE", "XDG_CACHE_HOME"):
            patch.delenv(name, raising=False)
        patch.setattr(tables.Path, "home", raising(RuntimeError("no home directory")))
        direct.forget()
        assert tables.load(CPU) is None and sk.explain(N=24).startswith("cpu:small: one")
        with pytest.raises(RuntimeError, match="no home directory"):
            sk.tune("cpu")
    for error in (PermissionError(13, "denied"), OSError(36, "File name too long")):
        with monkeypatch.context() as patch:
            patch.setattr(tables.Path, "is_file", raising(error))
            tables.load_from.cache_clear()
            assert tables.load(CPU) is None
    tables.load_from.cache_clear()


def raising(error):
    def function(*_):
        raise error

    return function


def test_a_way_that_cannot_be_trusted_is_not_measured(cache, monkeypatch):
    monkeypatch.setattr(selfcheck, "CHECKED", {})
    kind = Kind(512, torch.float32, ONE_SIDED, True)
    assert tuning.ways_at(CPU, kind, 256) == ["reference", "cpu:panel", "cpu:small"]
    assert tuning.ways_at(CPU, kind, 257) == ["reference", "cpu:panel"]
    monkeypatch.setattr(selfcheck, "CHECKED", {})
    monkeypatch.setattr(selfcheck, "failure", lambda *_: "wrong")
    with pytest.warns(UserWarning, match="cpu:small failed its self-check"):
        assert tuning.ways_at(CPU, kind, 24) == ["reference"]


def test_what_is_measured_on_a_gpu():
    half, small = Kind(512, torch.bfloat16, MIRROR, True), described((8, 0), memory=2**26)
    every = ["reference", "triton:panel", "triton:tile", "cuda:panel", "cuda:single"]
    assert tuning.gpu_ways(described((8, 0)), half, 24) == every
    assert tuning.gpu_ways(described((9, 0)), half, 24) == [*every, "cuda:hopper"]
    assert tuning.gpu_ways(described((9, 0), ("triton",)), half, 24) == every[:3]
    assert tuning.gpu_ways(small, half, 4096) == every[1:4]


def test_tune_says_at_once_what_is_in_its_way(cache, monkeypatch):
    monkeypatch.setattr(tuning, "measured", raising(AssertionError("measured")))
    for budget in (0, -5, float("nan")):
        with pytest.raises(ValueError, match="budget must be a positive number of seconds"):
            sk.tune("cpu", budget=budget)
    (cache / "file").touch()
    monkeypatch.setenv("SUPCLAP_CACHE", str(cache / "file/folder"))
    with pytest.raises(OSError):
        sk.tune("cpu")


def test_tune_keeps_a_table_where_it_measures_nothing(cache):
    written()
    with pytest.raises(RuntimeError, match="nothing could be measured in 1e-09 seconds"):
        sk.tune("cpu", budget=1e-9)
    assert tables.load(CPU) is not None


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_tune_where_no_gradient_is_recorded(cache, monkeypatch, guard):
    monkeypatch.setitem(tuning.SIZES, "cpu", (4,))
    monkeypatch.setattr(tuning, "SETTLED", 0.0)
    monkeypatch.setattr(tuning, "KINDS", tuning.KINDS[:1])
    with guard():
        assert sk.tune("cpu", report=lambda line: None).is_file()


def test_other_numbers_are_no_other_choice(cache, monkeypatch):
    """A schedule of alpha or beta looks nothing up."""
    X = torch.randn(24, 8)
    sk.fused_svr_loss(X, X, 0.1)
    monkeypatch.setattr(dispatch, "routes", raising(AssertionError("asked again")))
    for n in range(3):
        sk.fused_svr_loss(X, X, 0.1, alpha=0.5 + n, beta=0.1 * n)


def test_tune_refuses_other_devices(cache):
    with pytest.raises(ValueError, match="tune measures CPUs and CUDA GPUs, got meta"):
        sk.tune("meta")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="tune: there is no CUDA device"):
            sk.tune("cuda")


def test_command_line(cache):
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "supclap_kernels", "tune", "--device", "cpu", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "nothing was measured on" in run("--show")
    measured = run("--budget", "2")
    assert "written to" in measured and "float32 mirror infonce, N = 24: " in measured
    shown = run("--show").splitlines()
    assert shown[0].endswith(".json") and shown[1] in measured
    assert run("--reset").startswith("removed ")
    assert run("--reset").startswith("there is no ")
    for arguments in (["--budget", "-5"], ["--device", "mps"], ["--device", "foo"]):
        command = [sys.executable, "-m", "supclap_kernels", "tune", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 2 and "Traceback" not in ended.stderr
