"""What a system does to a run: signals to the whole job, killed workers, modes of files, terminals,
memory, processes that nobody started."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import supclap
import torch
from clips import log_of, write_clips
from supclap import files
from supclap.checkpoint import STATE
from supclap.cli import main
from supclap.errors import UserError, explained
from supclap.ranks import ECHO, Ranks, stop_asked

import supclap_kernels

pytestmark = pytest.mark.usefixtures("one_thread")


TINY = ["--width", "16", "--heads", "1", "--audio-layers", "1", "--text-layers", "1"]


def environment(**more):
    roots = {str(Path(package.__file__).parents[1]) for package in (supclap, supclap_kernels)}
    path = os.pathsep.join([*sorted(roots), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


@pytest.fixture
def started():
    """Starts a command in a session of its own, where a signal is one to the whole job."""
    processes = []

    def start(*arguments, **more):
        process = subprocess.Popen(
            [sys.executable, "-m", "supclap", *map(str, arguments)], env=environment(**more),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_steps(process, run, count):
    log, deadline = run / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= count):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


LONG = ["--epochs", "100000", "--batch-size", "4", *TINY]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_job_loses_no_step(manifest, tmp_path, started, number):
    """Workers leave it to their parent, which ends its step and writes it down."""
    run = tmp_path / "run"
    process = started(
        "train", "--data", manifest, "--out", run, *LONG, "--workers", "2", "--cache", "off"
    )
    wait_for_steps(process, run, 7)
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)  # as torchrun passes on what it got
    printed, message = process.communicate(timeout=60)
    assert process.returncode == 130, message[-2000:]
    assert "interrupted after step" in message and "Traceback" not in message
    steps = len(log_of(run))
    state = torch.load(run / STATE, weights_only=True)
    assert state["progress"]["step"] == steps and f"after step {steps} of" in message


def test_a_worker_that_is_killed_is_called_that(manifest, tmp_path, started):
    run = tmp_path / "run"
    process = started(
        "train", "--data", manifest, "--out", run, *LONG, "--workers", "2", "--cache", "off"
    )
    wait_for_steps(process, run, 3)
    deadline = time.monotonic() + 60
    while process.poll() is None:  # each epoch has workers of its own
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        with contextlib.suppress(ProcessLookupError):
            os.kill(int([*children, 2**22][0]), signal.SIGKILL)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    printed, message = process.communicate(timeout=60)
    assert process.returncode == 2, message[-2000:]
    assert "supclap: a process that decodes audio was killed" in message
    assert "cannot write" not in message


def test_workers_end_with_their_parent(manifest, tmp_path, started):
    run = tmp_path / "run"
    process = started(
        "train", "--data", manifest, "--out", run, *LONG, "--workers", "2", "--cache", "off"
    )
    wait_for_steps(process, run, 1)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_only_a_second_ctrl_c_ends_a_step(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("supclap.ranks.time.monotonic", lambda: clock[0])
    with stop_asked() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # an echo
        assert asked()
        clock[0] = ECHO + 1.0
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_within_the_handler_of_another():
    """torchrun passes on what the whole job got: the second may come while the first is handled, at
    any of its lines."""

    def lines_of_handler(second):
        seen = 0

        def each(frame, event, argument):
            nonlocal seen
            seen += event == "line"
            if event == "line" and seen == second:
                os.kill(os.getpid(), signal.SIGTERM)
            return each

        with stop_asked() as asked:
            signal.alarm(5)
            sys.settrace(each)
            os.kill(os.getpid(), signal.SIGTERM)
            sys.settrace(None)
            assert asked()
        return seen

    def waits_for_ever(number, frame):
        raise AssertionError("the second handler waits for the first")

    before = signal.signal(signal.SIGALRM, waits_for_ever)
    try:
        count = lines_of_handler(second=0)
        assert count >= 3
        for line in range(1, count + 1):
            assert lines_of_handler(line) >= line  # it was sent
    finally:
        sys.settrace(None)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_file_system_without_modes(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    files.write_whole(tmp_path / "x", lambda path: os.chmod(path, 0o600))
    assert (tmp_path / "x").exists()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_modes_that_the_umask_says(manifest, tmp_path, mask):
    arguments = ["train", "--data", manifest, "--out", tmp_path / "run", "--epochs", "1", *TINY]
    process = subprocess.Popen(
        [sys.executable, "-m", "supclap", *map(str, [*arguments, "--cache", tmp_path / "kept"])],
        env=environment(), preexec_fn=lambda: os.umask(mask), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.wait(120) == 0
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"model.safetensors", "finished.pt", "log.jsonl"} <= {path.name for path in paths}
    assert any(path.name.startswith("features-") for path in paths)
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o666 & ~mask}


def test_a_terminal_that_is_not_utf_8(manifest, tmp_path, started):
    other = write_clips(tmp_path)
    other.write_text('file_name,caption\ndog.wav,"ein Hündchen"\nno-ü.wav,x\n', encoding="utf-8")
    for encoding in ("ascii", "latin-1"):
        process = started("check", other, PYTHONIOENCODING=encoding)
        printed, message = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in message
        assert "no such file" in printed


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "out of memory"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "was killed"),
    ],
)
def test_errors_of_any_call_are_explained(monkeypatch, tmp_path, capsys, error, expected):
    assert expected in str(explained(error))

    def fails(*args, **options):
        raise error

    monkeypatch.setattr("supclap.run.choose_device", fails)
    assert main(["train", "--data", "a", "--out", str(tmp_path / "x")]) == 2
    message = capsys.readouterr().err
    assert expected in message and "Traceback" not in message
    with pytest.raises(UserError, match=expected):  # the disk is not blamed
        files.write_whole(tmp_path / "file", fails)
    assert explained(RuntimeError("shapes do not fit")) is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x",
             "MASTER_PORT": "99999"}, "MASTER_PORT",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0", "MASTER_ADDR": "x",
             "MASTER_PORT": "1"}, "with RANK=x",
        ),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE="),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x",
             "MASTER_PORT": "1"}, "RANK=2 is none of WORLD_SIZE=2",
        ),
    ],
)  # fmt: skip
def test_processes_that_torchrun_did_not_start(monkeypatch, variables, expected):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks(torch.device("cpu")).count == 1
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        Ranks(torch.device("cpu"))
