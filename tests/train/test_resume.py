"""A run that is interrupted, killed or short of disk goes on as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import soundfile
import torch
from clips import SMALL, Stop, log_of, settings, stopped_at
from supclap import files
from supclap.checkpoint import FINISHED, STATE
from supclap.cli import main
from supclap.config import config_text, read_config
from supclap.corpus import load_corpus
from supclap.errors import Interrupted, UserError
from supclap.logs import read_lines
from supclap.model import load_model
from supclap.step import backward
from supclap.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


def full_settings(manifest, out, **changes):
    """Everything that draws random numbers or has a state."""
    model = SMALL.__class__(**{**vars(SMALL), "dropout": 0.3, "max_seconds": 0.5})
    options = {
        "epochs": 3, "batch_size": 4, "svr": "bi-dynamic", "learn_tau": True, "val": manifest,
        "checkpoint_every": 2, "diagnose_every": 3, "validate_every": 2, "model": model,
    }  # fmt: skip
    return settings(manifest, out, **(options | changes))


@pytest.mark.parametrize("at", [1, 2, 5, 6, 11])
def test_a_resumed_run_is_the_run(manifest, tmp_path, monkeypatch, at):
    """Bit for bit: losses, diagnostics, validation, weights; every step once."""
    whole = train(full_settings(manifest, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stopped_at(patch, at)
        with pytest.raises(Stop):
            train(full_settings(manifest, tmp_path / "part"))
    random.seed(at)
    torch.manual_seed(at)
    run = train(read_config(tmp_path / "part"), resume=True)
    for name in ("log", "val", "diagnostics"):
        assert log_of(run, name) == log_of(whole, name)
    assert [line["step"] for line in log_of(run)] == list(range(1, 16))
    ours, theirs = load_model(run).state_dict(), load_model(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (run / STATE).exists()


def test_workers_and_where_features_are_kept_change_nothing(manifest, tmp_path):
    plain = log_of(train(full_settings(manifest, tmp_path / "a")))
    for n, changes in enumerate(
        ({"workers": 2}, {"cache": "off", "workers": 2}, {"cache": str(tmp_path / "kept")})
    ):
        for again in range(2 if "kept" in str(changes) else 1):
            run = train(full_settings(manifest, tmp_path / f"b{n}{again}", **changes))
            assert log_of(run) == plain
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_features_on_disk_are_those_of_the_files(manifest, tmp_path, monkeypatch):
    first = load_corpus(manifest, 30.0, cache=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("supclap.corpus.load_first", None)  # nothing is decoded again
        again = load_corpus(manifest, 30.0, cache=str(tmp_path))
    pairs = zip(first.kept, again.kept, strict=True)
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)
    other = load_corpus(manifest, 0.4, cache=str(tmp_path))
    assert other.kept[0].shape != first.kept[0].shape
    (path, _) = sorted(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])  # a broken one is made anew
    assert torch.equal(load_corpus(manifest, 30.0, cache=str(tmp_path)).kept[1], first.kept[1])


def test_a_long_clip_is_cropped_anew_in_training_and_never_in_evaluation(tmp_path):
    soundfile.write(tmp_path / "a.wav", torch.randn(48_000).mul(0.1).numpy(), 16_000)
    (tmp_path / "m.csv").write_text("file_name,caption\na.wav,x\n")
    for cache in ("memory", "off"):
        corpus = load_corpus(tmp_path / "m.csv", 1.0, cache=cache)
        assert corpus.longer.tolist() == [True]
        still, draws = corpus.features(0), [corpus.features(0, [seed]) for seed in range(6)]
        assert all(x.shape == still.shape for x in draws)
        assert len({x.sum().item() for x in [still, *draws]}) >= 6
        assert torch.equal(corpus.features(0, [3]), draws[3])
        assert torch.equal(corpus.features(0), still)


def test_sigterm_ends_a_run_after_its_step(manifest, tmp_path, monkeypatch):
    whole, calls = backward, []

    def asked(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("supclap.run.backward", asked)
    with pytest.raises(Interrupted, match="(?s)interrupted after step 3 of 15.*--resume"):
        train(full_settings(manifest, tmp_path / "run", checkpoint_every=None))
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(log_of(tmp_path / "run")) == 3
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, 16))


def test_what_cannot_be_resumed_is_said(manifest, tmp_path, capsys):
    run = train(settings(manifest, tmp_path / "run", epochs=1))
    for arguments, expected in (
        (["--resume", str(run)], "is finished"),
        (["--resume", str(tmp_path / "no")], "is not a run"),
        (["--data", str(manifest), "--out", str(run)], "already holds a run"),
        (["--resume", str(run), "--lr", "1", "--recipe", "paper"], "drop --lr, --recipe"),
    ):
        assert main(["train", *arguments]) == 2
        assert expected in capsys.readouterr().err
    (run / FINISHED).unlink()
    assert main(["train", "--resume", str(run)]) == 2
    assert "has no state.pt to go on from" in capsys.readouterr().err
    (run / STATE).write_bytes(b"nothing")
    assert main(["train", "--resume", str(run)]) == 2
    assert "cannot read the run's state" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(manifest, tmp_path, monkeypatch, capsys):
    """The second state does not fit: the first one, the model and the log stay as they were."""
    out, whole, calls = tmp_path / "run", torch.save, []

    def full(value, path):
        calls.append(1)
        if len(calls) == 2:
            path.write_bytes(b"the first bytes")
            raise OSError(28, "No space left on device")
        whole(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*state.pt: .*No space left"):
        train(full_settings(manifest, out))
    monkeypatch.undo()
    load_model(out)
    assert {path.name for path in out.iterdir()} == {
        STATE, "model.safetensors", "config.json", "log.jsonl", "val.jsonl", "speed.jsonl",
        "diagnostics.jsonl",
    }  # fmt: skip
    run = train(read_config(out), resume=True)
    assert [line["step"] for line in log_of(run)] == list(range(1, 16))


def test_a_full_disk_leaves_other_outputs_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, [1])

    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(UserError, match="No space left on device; what was there is as it was"):
        files.write_json(path, [2])
    assert json.loads(path.read_text()) == [1] and list(tmp_path.iterdir()) == [path]


def test_kill_at_any_moment(manifest, tmp_path):
    """SIGKILL after random times: what is there loads, and the resumed log has every step once."""
    options = {"checkpoint_every": 1, "epochs": 8}
    whole = train(full_settings(manifest, tmp_path / "whole", **options))
    steps, rng = len(log_of(whole)), random.Random(0)
    out = tmp_path / "run"
    config = full_settings(manifest, out, **options)
    out.mkdir()
    (out / "settings.json").write_text(config_text(config))
    # One process that waits to be told: importing takes longer than a run.
    code = (
        "import sys, pathlib, torch; torch.set_num_threads(1);"
        "from supclap import config, train; p = pathlib.Path(sys.argv[1]);"
        "(p / 'config.json').exists() or (p / 'settings.json').rename(p / 'config.json');"
        "c = config.read_config(p); print('ready', flush=True); sys.stdin.readline();"
        "train.train(c, resume=(p / 'state.pt').exists())"
    )  # a run without a state begins anew, unasked
    kills = done = 0
    while not done and kills < 12:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(rng.uniform(0.02, 0.5))
        process.kill()
        process.communicate()
        kills += 1
        done = (out / FINISHED).exists()
        if (out / STATE).exists():
            load_model(out)
            lines = read_lines(out / "log.jsonl")
            assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    if not done:
        train(read_config(out), resume=(out / STATE).exists())
    assert log_of(out) == log_of(whole) and len(log_of(out)) == steps
    assert kills >= 3


def test_two_processes_resume_as_one_run(manifest, tmp_path):
    """Each has its own random numbers; all go on from the same step."""
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys, torch\n"
        "from supclap import config, run as parts, train\n"
        "torch.set_num_threads(1)\n"
        "run, at = pathlib.Path(sys.argv[1]), int(sys.argv[2])\n"
        "settings, whole, calls = config.read_config(run), parts.backward, []\n"
        "def dies(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == at:\n"
        "        sys.exit(3)\n"
        "    return whole(*args)\n"
        "parts.backward = dies\n"
        "train.train(settings, resume=(run / 'state.pt').exists())\n"
    )

    def go(name, at):
        out = tmp_path / name
        if not out.exists():
            out.mkdir()
            config = full_settings(manifest, out, batch_size=6, checkpoint_every=2, epochs=2)
            (out / "config.json").write_text(config_text(config))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", str(script), str(out), str(at)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = go("whole", -1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert go("part", 4).returncode != 0
    lines = log_of(tmp_path / "part")
    assert (tmp_path / "part" / STATE).exists() and len(lines) == 3
    done = go("part", -1)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("log", "val", "diagnostics"):
        assert log_of(tmp_path / "part", name) == log_of(tmp_path / "whole", name)


def test_a_run_does_not_go_on_with_other_data(manifest, tmp_path, monkeypatch):
    copy = tmp_path / "clips.csv"
    text = manifest.read_text()
    for path in manifest.parent.glob("*.wav"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    copy.write_text(text)
    with monkeypatch.context() as patch:
        stopped_at(patch, 3)
        with pytest.raises(Stop):
            train(full_settings(copy, tmp_path / "run"))
    copy.write_text(text.replace("we hear a dog", "we heard a dog"))
    with pytest.raises(UserError, match="clips or captions of its manifest have changed"):
        train(read_config(tmp_path / "run"), resume=True)
    copy.write_text(text)
    monkeypatch.chdir(tmp_path / "run")  # its paths do not depend on where it is resumed
    train(read_config(tmp_path / "run"), resume=True)


def test_validation_between_epochs_selects_too(manifest, tmp_path):
    run = train(full_settings(manifest, tmp_path / "run"))
    steps = [line["step"] for line in log_of(run, "val")]
    assert steps == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    finished = json.loads((run / FINISHED).read_text())
    assert finished["step"] == 15 and "mean R@1 on --val" in finished["model"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_during_training_is_named(manifest, tmp_path, monkeypatch, workers):
    """--cache off reads headers first; what is wrong behind them is said without a traceback."""
    rows = ["file_name,caption"]
    for path in sorted(manifest.parent.glob("*.wav"))[:4]:
        wave, rate = soundfile.read(path)
        soundfile.write(tmp_path / path.name, wave, rate, subtype="FLOAT")
        rows.append(f"{path.name},a sound")
    wave[len(wave) // 2] = float("nan")
    soundfile.write(tmp_path / path.name, wave, rate, subtype="FLOAT")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    options = {"cache": "off", "workers": workers, "batch_size": 2, "val": None}
    with pytest.raises(UserError) as error:
        train(settings(tmp_path / "m.csv", tmp_path / "run", **options))
    message = str(error.value)
    assert f"{path.name} (line 5): the clip has NaN" in message and "Traceback" not in message
    run = train(settings(tmp_path / "m.csv", tmp_path / "other", skip_bad_audio=True, **options))
    assert len(log_of(run)) == 4


def test_ranks_share_a_cache_and_want_pairs(manifest, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += ["-m", "supclap", "train", "--data", str(manifest), "--cache", str(tmp_path / "c")]
    command += ["--width", "16", "--heads", "1", "--epochs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for size, code in ((9, 0), (2, 1)):
        options = ["--out", str(tmp_path / f"run{size}"), "--batch-size", str(size)]
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-3000:]
    assert "a batch of 2 pairs is too small for 3 processes" in done.stderr
    assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".safetensors"]
