"""The command as a user meets it: exit codes, messages, files, Ctrl-C, the demo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import supclap
from supclap import synth
from supclap.cli import main
from supclap.manifest import read_manifest
from supclap.model import load_model

import supclap_kernels

TINY = ["--width", "16", "--heads", "1", "--audio-layers", "1", "--text-layers", "1"]


def command(*arguments):
    """`python -m supclap ...` in a process of its own, which hears Ctrl-C whoever started us: what
    a shell runs in the background ignores it, and so would its children."""
    roots = {str(Path(package.__file__).parents[1]) for package in (supclap, supclap_kernels)}
    path = os.pathsep.join([*sorted(roots), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "supclap", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "corpus"
    assert main(["synth", str(out), "--clips", "12", "--seed", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def run(corpus):
    out = corpus.parent / "run"
    data, val = str(corpus / "train.csv"), str(corpus / "val.csv")
    arguments = ["train", "--data", data, "--val", val, "--out", str(out), "--epochs", "2"]
    assert main([*arguments, *TINY]) == 0
    return out


def test_eval_prints_the_rule_and_writes_the_json(corpus, run, tmp_path, capsys):
    report = tmp_path / "metrics.json"
    assert main(["eval", str(run), "--data", str(corpus / "test.csv"), "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads(report.read_text())
    assert set(metrics) == {"rule", "t2a", "a2t"}
    assert metrics["rule"] in printed and "every caption is a query" in metrics["rule"]
    for way in ("t2a", "a2t"):
        assert set(metrics[way]) == {"R@1", "R@5", "R@10", "mAP@10", "median_rank"}
        shares = [metrics[way][name] for name in ("R@1", "R@5", "R@10", "mAP@10")]
        assert all(0 <= share <= 1 for share in shares) and metrics[way]["median_rank"] >= 1
        assert f"{100 * metrics[way]['R@1']:.2f}" in printed
    assert "2 clips, 10 captions" in printed


def test_a_batch_larger_than_the_data_is_said_and_works(corpus, tmp_path, capsys):
    arguments = ["train", "--data", str(corpus / "test.csv"), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--epochs", "3", *TINY]) == 0
    assert "batch size 64 is larger than the data: all 10 pairs make one batch" in (
        capsys.readouterr().out
    )
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 3


def test_bad_audio_stops_before_anything_is_written_or_is_skipped(tmp_path, capsys):
    soundfile.write(tmp_path / "good.wav", np.sin(np.arange(8_000) / 20), 16_000)
    (tmp_path / "m.csv").write_text("file_name,caption_1\ngood.wav,a hum\ngone.wav,nothing\n")
    out = tmp_path / "run"
    arguments = ["train", "--data", str(tmp_path / "m.csv"), "--out", str(out), "--epochs", "1"]
    assert main([*arguments, *TINY]) == 2
    message = capsys.readouterr().err
    assert "gone.wav (line 3): no such file" in message and "supclap: 1 of 2" in message
    assert not out.exists()
    assert main([*arguments, *TINY, "--skip-bad-audio"]) == 0
    printed = capsys.readouterr().out
    assert "skipped 1 bad audio file" in printed and "gone.wav" in printed
    assert "1 clips, 1 pairs" in printed


def test_an_earlier_run_is_not_overwritten_unasked(corpus, run, capsys):
    before = (run / "log.jsonl").read_bytes()
    arguments = ["train", "--data", str(corpus / "test.csv"), "--out", str(run), "--epochs", "1"]
    assert main([*arguments, *TINY]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (run / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "{tmp}/none", "--data", "{corpus}/test.csv"], "not a run"),
        (["eval", "{run}", "--data", "{tmp}/none.csv"], "manifest not found"),
        (["eval", "{run}", "--data", "{corpus}/val.csv", "--json", "{tmp}/a/b"], "no folder"),
        (["train", "--data", "{tmp}/none.csv", "--out", "{tmp}/x"], "manifest not found"),
        (["train", "--data", "{corpus}", "--out", "{tmp}/x"], "is a folder, no manifest"),
        (["train", "--data", "{corpus}/val.csv", "--out", "{file}/x"], "Not a directory"),
        (["train", "--data", "a", "--out", "b", "--epochs", "0"], "--epochs must be at least 1"),
        (["train", "--data", "a", "--out", "b", "--threads", "0"], "--threads must be at least 1"),
        (["synth", "{tmp}/c", "--clips", "1"], "--clips must be between"),
        (["synth", "{tmp}/c", "--seed", "-1"], "--seed must be in"),
        (["synth", "{corpus}"], "already holds a corpus"),
        (["demo", "--out", "{corpus}"], "not an earlier demo"),
    ],
)
def test_errors_have_a_message_and_exit_code_2(corpus, run, tmp_path, capsys, arguments, expected):
    file = tmp_path / "file"
    file.touch()
    names = {"tmp": tmp_path, "corpus": corpus, "run": run, "file": file}
    assert main([part.format(**names) for part in arguments]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.splitlines()[-1].startswith("supclap: ")


def test_a_process_fails_without_a_traceback(tmp_path):
    process = command("train", "--data", tmp_path / "none.csv", "--out", tmp_path / "run")
    printed, message = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in printed + message
    assert message.strip() == f"supclap: manifest not found: {tmp_path / 'none.csv'}"


def test_a_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for module in ("audio", "corpus", "synth", "train", "evaluate", "model"):
        monkeypatch.delitem(sys.modules, f"supclap.{module}", raising=False)
    assert main(["synth", str(tmp_path / "corpus")]) == 2
    message = capsys.readouterr().err
    assert "soundfile is not installed; pip install 'supclap-kernels[train]'" in message


@pytest.mark.parametrize("val", [False, True], ids=["last", "best"])
def test_ctrl_c_keeps_checkpoint_and_log_and_says_so(corpus, tmp_path, val, capsys):
    out = tmp_path / "run"
    arguments = ["train", "--data", corpus / "train.csv", "--out", out, "--epochs", "100000", *TINY]
    process = command(*arguments, *(["--val", corpus / "val.csv"] if val else []))
    log = out / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed + message
    assert "interrupted after step" in message and f"supclap eval {out}" in message
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) >= 5 and [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    load_model(out)
    assert main(["eval", str(out), "--data", str(corpus / "test.csv")]) == 0


def test_the_demo_ends_with_a_table_and_the_path_of_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a second demo may write over the first
        assert main(["demo", "--clips", "12", "--epochs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "report: supclap-demo/report.png"
    table = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    metrics = json.loads(Path("supclap-demo/report.json").read_text())
    for name in ("InfoNCE", "bi-StaticSVR", "chance"):
        numbers = [
            f"{100 * metrics[name][way][column]:.2f}"
            for way in ("t2a", "a2t")
            for column in ("R@1", "R@10", "mAP@10")
        ]
        assert table[name] == numbers
    picture = Path("supclap-demo/report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    for run, radius in (("infonce", None), ("bi-static", 1.0)):
        first = json.loads(Path(f"supclap-demo/{run}/log.jsonl").read_text().splitlines()[0])
        assert first["radius"] == radius
    assert len(read_manifest(Path("supclap-demo/corpus/test.csv"))) == round(
        12 * synth.SPLITS["test"]
    )
