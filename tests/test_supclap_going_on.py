"""Runs that are stopped by a system, moved, extended or begun from; what is said before a traceback
would be."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import soundfile
import supclap
import torch
from supclap import data, files
from supclap import train as loop
from supclap.checkpoint import FINISHED, STATE
from supclap.cli import main
from supclap.config import UserError, explained, read_config
from supclap.manifest import read_manifest
from supclap.model import load_model
from supclap.ranks import ECHO, Ranks, stop_asked
from supclap_clips import Stop, log_of, settings, stopped_at, write_clips

import supclap_kernels

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["--width", "16", "--heads", "1", "--audio-layers", "1", "--text-layers", "1"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


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
        assert asked.is_set()
        clock[0] = ECHO + 1.0
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def stopped(monkeypatch, config, step):
    """The folder of a run that died after so many steps."""
    with monkeypatch.context() as patch:
        stopped_at(patch, step)
        with pytest.raises(Stop):
            loop.train(config)
    return config.out


def copied(manifest, folder, text=None):
    folder.mkdir(parents=True)
    for path in manifest.parent.glob("*.wav"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "other.csv").write_text(manifest.read_text() if text is None else text)
    return folder / "other.csv"


@pytest.mark.parametrize("absolute", [False, True])
def test_a_run_goes_on_with_data_that_moved(manifest, tmp_path, monkeypatch, absolute):
    given = {"batch_size": 4, "checkpoint_every": 2, "val": manifest}
    whole = loop.train(settings(manifest, tmp_path / "whole", **given))
    before = copied(manifest, tmp_path / "before")
    if absolute:
        header, *rows = before.read_text().splitlines()
        before.write_text("\n".join([header, *(f"{before.parent}/{row}" for row in rows)]))
    config = settings(before, tmp_path / "run", **(given | {"val": before}))
    run = stopped(monkeypatch, config, 3)
    (tmp_path / "before").rename(tmp_path / "after")
    moved = tmp_path / "after/other.csv"
    moved.write_text(moved.read_text().replace(str(before.parent), str(moved.parent)))
    assert main(["train", "--resume", str(run)]) == 2
    arguments = ["train", "--resume", str(run), "--data", str(moved), "--val", str(moved)]
    assert main(arguments) == 0
    assert log_of(run) == log_of(whole)
    assert read_config(run).data == moved and read_config(run).val == moved


@pytest.mark.parametrize("option", ["data", "val"])
def test_what_differs_is_said(manifest, tmp_path, monkeypatch, capsys, option):
    config = settings(manifest, tmp_path / "run", batch_size=4, val=manifest)
    run = stopped(monkeypatch, config, 3)
    rows = manifest.read_text().splitlines()
    rows[2] = rows[2].replace("we hear", "we heard")
    text = "\n".join([*rows[:-1], f"{rows[1].split(',')[0].replace('dog', 'train')},x,y"])
    other = copied(manifest, tmp_path / "other", text)
    assert main(["train", "--resume", str(run), f"--{option}", str(other)]) == 2
    message = capsys.readouterr().err
    assert "have changed since: 1 gone (clock.wav); " in message
    assert "with other captions (" in message and "rain.wav" in message
    assert read_config(run).data == manifest  # nothing was changed
    other.write_text("\n".join([rows[0], *manifest.read_text().splitlines()[:0:-1]]))
    assert main(["train", "--resume", str(run), f"--{option}", str(other)]) == 2
    assert "the same clips in another order" in capsys.readouterr().err


def test_a_state_of_an_earlier_version_fits(manifest, tmp_path, monkeypatch, capsys):
    """It has no list of pairs, and its fingerprint is of the names as written."""
    other = copied(manifest, tmp_path / "other")
    header, *rows = other.read_text().splitlines()
    other.write_text("\n".join([header, *(f"{other.parent}/{row}" for row in rows)]))
    run = stopped(monkeypatch, settings(other, tmp_path / "run", batch_size=4), 3)
    state = torch.load(run / STATE, weights_only=True)
    said = [[c.name, c.captions, c.languages] for c in read_manifest(other)]
    assert state.pop("pairs") and state["data"] != data.digest(said)
    torch.save(state | {"data": data.digest(said)}, run / STATE)
    torch.save(state | {"data": "another"}, run / "other.pt")
    assert main(["train", "--resume", str(run)]) == 0
    (run / FINISHED).unlink()
    (run / "other.pt").rename(run / STATE)
    assert main(["train", "--resume", str(run)]) == 2
    assert "have changed since, or are read otherwise now; begin" in capsys.readouterr().err


def test_swapped_audio_is_noticed(manifest, tmp_path, monkeypatch, capsys):
    """Files of one name in several folders, named absolutely."""
    rows = ["file_name,caption"]
    for n, path in enumerate(sorted(manifest.parent.glob("*.wav"))[:4]):
        (tmp_path / f"d/{n}").mkdir(parents=True)
        (tmp_path / f"d/{n}/a.wav").write_bytes(path.read_bytes())
        rows.append(f"{tmp_path}/d/{n}/a.wav,sound {n}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    run = stopped(monkeypatch, settings(tmp_path / "m.csv", tmp_path / "run", batch_size=2), 1)
    swapped = "\n".join(rows).replace("/0/", "/x/").replace("/3/", "/0/").replace("/x/", "/3/")
    (tmp_path / "m.csv").write_text(swapped)
    assert main(["train", "--resume", str(run)]) == 2
    assert "2 with other captions (0/a.wav, 3/a.wav)" in capsys.readouterr().err
    (tmp_path / "m.csv").write_text("\n".join(rows).replace("/d/", "/e/"))
    (tmp_path / "d").rename(tmp_path / "e")
    assert main(["train", "--resume", str(run)]) == 0


def test_names_of_another_disk_are_the_same(manifest, tmp_path, monkeypatch):
    for form in ("NFC", "NFD"):
        other = copied(manifest, tmp_path / form)
        name = unicodedata.normalize(form, "Hündchen.wav")
        (other.parent / "dog.wav").rename(other.parent / name)
        other.write_text(other.read_text().replace("dog.wav", name), encoding="utf-8")
    config = settings(tmp_path / "NFC/other.csv", tmp_path / "run", batch_size=4)
    run = stopped(monkeypatch, config, 2)
    arguments = ["train", "--resume", str(run), "--data", str(tmp_path / "NFD/other.csv")]
    assert main(arguments) == 0


def test_a_file_system_without_modes(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    files.write_whole(tmp_path / "x", lambda path: os.close(os.open(path, os.O_CREAT, 0o600)))
    assert (tmp_path / "x").exists()


def test_a_finished_run_is_extended(manifest, tmp_path, capsys):
    """With a constant rate the run is the one that was longer from the start."""
    given = {"batch_size": 4, "schedule": "constant", "warmup": 0.0, "val": manifest}
    whole = loop.train(settings(manifest, tmp_path / "whole", epochs=4, **given))
    run = loop.train(settings(manifest, tmp_path / "run", epochs=2, **given))
    assert main(["train", "--resume", str(run), "--epochs", "2"]) == 2
    message = capsys.readouterr().err
    assert "is finished; go on with more than its --epochs 2, or begin" in message
    assert main(["train", "--resume", str(run), "--epochs", "4"]) == 0
    for name in ("log", "val"):
        assert log_of(run, name) == log_of(whole, name)
    ours, wanted = load_model(run).state_dict(), load_model(whole).state_dict()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert read_config(run).epochs == 4 and not (run / STATE).exists()
    assert main(["train", "--resume", str(run), "--epochs", "3"]) == 2
    assert "more than its --epochs 4" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [0, 2])
def test_an_extension_that_is_stopped_goes_on(manifest, tmp_path, monkeypatch, steps):
    given = {"batch_size": 4, "checkpoint_every": 1}
    run = loop.train(settings(manifest, tmp_path / "run", epochs=1, **given))
    with monkeypatch.context() as patch:
        stopped_at(patch, steps)
        with pytest.raises(Stop):
            main(["train", "--resume", str(run), "--epochs", "3"])
    assert not (run / FINISHED).exists() and len(log_of(run)) == 5 + steps
    if steps:  # else it would be as long as it was
        assert main(["train", "--resume", str(run), "--epochs", "1"]) == 2
    assert main(["train", "--resume", str(run)]) == 0
    assert [line["step"] for line in log_of(run)] == list(range(1, 16))


def test_a_run_begins_from_another(manifest, tmp_path, capsys):
    first = loop.train(settings(manifest, tmp_path / "first", learn_tau=True, batch_size=4))
    arguments = ["train", "--data", str(manifest), "--out", str(tmp_path / "second")]
    arguments += ["--init", str(first), "--batch-size", "4", "--epochs", "1"]
    # The first step is of the other's weights, temperature and radius, with a schedule of its own.
    assert main([*arguments, "--lr", "1e-9", "--warmup", "0"]) == 0
    second = tmp_path / "second"
    ours, theirs = load_model(second).state_dict(), load_model(first).state_dict()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-6
    line, last = log_of(second)[0], log_of(first)[-1]
    assert line["step"] == 1 and line["lr"] == 1e-9
    assert abs(line["radius"] - last["radius"]) < 1e-3 and abs(line["radius"] - 0.1) > 1e-4
    assert line["logit_scale"] != 1 / 0.07
    (first / "config.json").rename(first / "gone.json")  # a run that goes on does not need it
    assert main(["train", "--resume", str(second), "--epochs", "2"]) == 0
    (first / "gone.json").rename(first / "config.json")
    assert read_config(second).tau == 0.07
    capsys.readouterr()
    for more in (["--width", "16"], ["--tau", "0.1"]):
        again = [*arguments, "--overwrite", *more]
        assert main(again) == 2
        assert f"drop {more[0]}" in capsys.readouterr().err
    assert main([*arguments[:-4], "--init", str(tmp_path / "none")]) == 2
    assert "is not a run" in capsys.readouterr().err
    loop.train(settings(manifest, tmp_path / "third", svr="bi-dynamic", init=first, epochs=1))
    assert "has no such radius: this one begins anew" in capsys.readouterr().out
    (first / "model.safetensors").unlink()
    assert main([*arguments, "--overwrite"]) == 2
    assert "it has no model.safetensors" in capsys.readouterr().err


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
    other = copied(manifest, tmp_path / "other")
    other.write_text('file_name,caption\ndog.wav,"ein Hündchen"\nno-ü.wav,x\n', encoding="utf-8")
    for encoding in ("ascii", "latin-1"):
        process = started("check", other, PYTHONIOENCODING=encoding)
        printed, message = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in message
        assert "no such file" in printed


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "out of memory"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "was killed"),
    ],
)
def test_errors_of_any_call_are_explained(monkeypatch, tmp_path, capsys, error, said):
    assert said in str(explained(error))

    def fails(*args, **options):
        raise error

    monkeypatch.setattr(loop, "choose_device", fails)
    assert main(["train", "--data", "a", "--out", str(tmp_path / "x")]) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message
    with pytest.raises(UserError, match=said):  # the disk is not blamed
        files.write_whole(tmp_path / "file", fails)
    monkeypatch.setattr(data, "decode", fails)
    assert explained(RuntimeError("shapes do not fit")) is None


@pytest.mark.parametrize(
    ("given", "said"),
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
def test_processes_that_torchrun_did_not_start(monkeypatch, given, said):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks(torch.device("cpu")).count == 1
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        Ranks(torch.device("cpu"))


def test_a_run_that_trains_nothing_says_so(manifest, tmp_path, capsys):
    one = tmp_path / "one"
    one.mkdir()
    (one / "dog.wav").write_bytes((manifest.parent / "dog.wav").read_bytes())
    rows = manifest.read_text().splitlines()
    (one / "one.csv").write_text("\n".join(rows[:2]))
    note = "no pair of a batch has a negative"
    for options, expected in (
        ({"batch_size": 1}, True), ({"batch_size": 2}, False),
        ({"batch_size": 1, "loss": "siglip"}, False),
        ({"data": one / "one.csv"}, True), ({"data": one / "one.csv", "ids": False}, False),
    ):  # fmt: skip
        given = {"epochs": 1, "overwrite": True, "data": manifest, **options}
        loop.train(settings(given.pop("data"), tmp_path / "run", **given))
        assert (note in capsys.readouterr().out) == expected, options
    loop.train(settings(manifest, tmp_path / "run", epochs=1, overwrite=True, val=one / "one.csv"))
    printed = capsys.readouterr().out
    assert "has one clip, which every model finds: the first epoch is kept" in printed
    assert json.loads((tmp_path / "run" / FINISHED).read_text())["epochs"] == 1


def test_a_search_hears_what_the_decoder_reads(manifest, tmp_path, capsys):
    run = loop.train(settings(manifest, tmp_path / "run", epochs=1))
    folder = tmp_path / "folder"
    folder.mkdir()
    wave, rate = soundfile.read(manifest.parent / "dog.wav")
    soundfile.write(folder / "dog.oga", wave, rate, format="OGG")
    soundfile.write(folder / "dog.AIF", wave, rate, format="AIFF")
    (folder / "notes.txt").write_text("no audio")
    whole = (folder / "dog.oga").read_bytes()
    (folder / "cut.oga").write_bytes(whole[: len(whole) // 2])
    assert main(["search", str(run), "a dog", "--audio", str(folder), "--lang", "French"]) == 0
    printed = capsys.readouterr().out
    assert "dog.oga" in printed and "dog.AIF" in printed and "notes" not in printed
    assert "skipped 1 bad audio file" in printed and "/cut.oga: " in printed
    assert main(["search", str(run), "a dog", "--audio", str(folder), "--lang", "xx"]) == 2
    assert "--lang: 'xx' is no language" in capsys.readouterr().err
