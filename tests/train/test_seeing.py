"""What a user sees of a run: lines, logs, pictures."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from clips import log_of, near, settings
from supclap import plot, progress, ranks, run
from supclap.cli import main
from supclap.clock import PARTS, Clock
from supclap.config import read_config
from supclap.corpus import load_corpus
from supclap.evaluate import chance, chance_of
from supclap.logs import read_lines
from supclap.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_line_for_each_validation(manifest, tmp_path, capsys):
    folder = train(
        settings(manifest, tmp_path / "run", epochs=2, batch_size=4, val=manifest, validate_every=3)
    )
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch ")]
    speed, validations = log_of(folder, "speed"), log_of(folder, "val")
    assert len(lines) == len(speed) == len(validations) == 5
    log = {line["step"]: line["loss"] for line in log_of(folder)}
    before = 0
    for text, fast, found in zip(lines, speed, validations, strict=True):
        assert fast["step"] == found["step"]
        mean = sum(log[step] for step in range(before + 1, fast["step"] + 1))
        mean /= fast["step"] - before
        where = f"epoch {fast['epoch']} of 2, step {fast['step']}"
        assert text.startswith(f"{where}: loss {mean:.3f}, ")
        assert f"R@1 {100 * found['t2a']['R@1']:.1f} % t2a" in text
        assert near(sum(fast[part] for part in PARTS), 1.0, within=1e-9)
        assert fast["pairs_per_second"] > 0 and all(fast[part] > 0 for part in PARTS)
        before = fast["step"]
    assert "the best so far" in lines[0]
    best = [max(sum(x[way]["R@1"] for way in ("t2a", "a2t")) for x in validations[:n]) if n else -1
            for n in range(5)]  # fmt: skip
    for text, found, before in zip(lines, validations, best, strict=True):
        now = sum(found[way]["R@1"] for way in ("t2a", "a2t"))
        assert ("the best so far" in text) == (now > before)  # a tie is none


def test_checkpoints_are_no_waiting_for_data(manifest, tmp_path, monkeypatch):
    slow = run.Run.checkpoint
    monkeypatch.setattr(run.Run, "checkpoint", lambda self: time.sleep(0.2) or slow(self))
    options = {"batch_size": 4, "epochs": 2, "checkpoint_every": 1}
    folder = train(settings(manifest, tmp_path / "run", **options))
    assert all(line["data"] < 0.5 for line in log_of(folder, "speed"))


def test_a_clock_counts_what_it_is_told(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 5.0, 105.0, 107.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"))
    for part in ("data", "model", "loss", None, "model"):
        clock.add(part)
    clock.pairs = 14
    line = clock.line()
    assert line == {"pairs_per_second": 2.0, "data": 1 / 7, "model": 5 / 7, "loss": 1 / 7}
    assert clock.line()["pairs_per_second"] == 0


def test_no_carriage_returns_in_a_file(manifest, tmp_path):
    command = [
        sys.executable,
        "-m",
        "supclap",
        "train",
        "--data",
        manifest,
        "--out",
        tmp_path / "r",
    ]
    command += ["--epochs", "2", "--width", "32", "--heads", "2", "--embed-dim", "32"]
    with (tmp_path / "output").open("w") as stream:
        outputs = {"stdout": stream, "stderr": stream}
        subprocess.run(list(map(str, command)), **outputs, check=True, timeout=120)
    text = (tmp_path / "output").read_text()
    assert "\r" not in text and "\n\n" not in text
    lines = text.splitlines()
    assert "reading clips.csv: 100%, 9 of 9" in text and "training: 100%, 2 of 2" in text
    assert sum(line.startswith("epoch ") for line in lines) == 2 and len(lines) <= 8


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Bar(total=2, desc="x") as bar:
        bar.update(2)
    progress.say("a line")
    shown = capsys.readouterr()
    assert "\r" in shown.err and "100%|" in shown.err and "a line" in shown.out


@pytest.mark.parametrize("ending", plot.ENDINGS)
def test_runs_in_one_picture(manifest, tmp_path, capsys, ending):
    for name, svr in (("a", "none"), ("b", "bi-static")):
        val = manifest if name == "a" else None
        train(settings(manifest, tmp_path / name, svr=svr, val=val, epochs=1))
    out = tmp_path / f"curves{ending}"
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".html": b"<!doctype html>"}
    assert out.read_bytes().startswith(begins[ending])
    if ending == ".html":
        assert "<svg" in out.read_text() and "http-equiv" not in out.read_text()
    capsys.readouterr()
    for arguments, expected in (
        ([tmp_path / "a", "--out", tmp_path / "x.gif"], "known endings are"),
        ([tmp_path, "--out", tmp_path / "x.png"], "has no log.jsonl"),
        ([tmp_path / "a", "--out", tmp_path / "no/x.png"], "there is no folder"),
    ):
        assert main(["plot", *map(str, arguments)]) == 2
        assert expected in capsys.readouterr().err


def test_two_runs_of_one_name(manifest, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plot, "plot_runs", lambda runs, path: seen.append(list(runs)))
    main(["plot", "x/run", "y/run", "--out", "c.png"])
    main(["plot", "x/a", "x/b", "--out", "c.png"])
    assert seen == [["x/run", "y/run"], ["a", "b"]]


class FakeRun:
    def __init__(self, **options):
        self.options, self.lines, self.metrics, self.ended = options, [], {}, False
        self.id = options["id"] or "fresh"

    def define_metric(self, name, step_metric):
        self.metrics[name] = step_metric

    def log(self, line):
        self.lines.append(line)

    def finish(self):
        self.ended = True


def test_weights_and_biases(manifest, tmp_path, monkeypatch):
    made = []
    fake = SimpleNamespace(init=lambda **options: made.append(FakeRun(**options)) or made[-1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = {"epochs": 1, "val": manifest, "wandb": True, "batch_size": 6}
    folder = train(settings(manifest, tmp_path / "run", **options))
    first = made[0]
    assert (
        first.options["id"] is None and first.ended and first.options["config"]["batch_size"] == 6
    )
    assert first.metrics == {f"{name}/*": "step" for name in ("log", "val", "speed")}
    losses = [line["log/loss"] for line in first.lines if "log/loss" in line]
    assert losses == [line["loss"] for line in log_of(folder)]
    assert any("val/t2a/R@1" in line for line in first.lines)
    assert [x["step"] for x in first.lines if "log/loss" in x] == [1, 2, 3]
    train(settings(manifest, folder, **options | {"epochs": 2}), resume=True)
    assert made[1].options["id"] == "fresh"  # goes on with the same
    train(settings(manifest, folder, overwrite=True, **options))
    assert made[2].options["id"] is None  # another one
    assert read_config(folder).wandb


def test_without_weights_and_biases(manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = ["--data", str(manifest), "--out", str(tmp_path / "run"), "--wandb"]
    assert main(["train", *arguments]) == 2
    assert "pip install 'supclap-kernels[wandb]'" in capsys.readouterr().err


def test_chance_is_shown(manifest, tmp_path, capsys):
    folder = train(settings(manifest, tmp_path / "run", epochs=1))
    capsys.readouterr()
    assert main(["eval", str(folder), "--data", str(manifest)]) == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("chance"))
    expected = chance(torch.arange(9).repeat_interleave(2))
    assert row.split()[1] == f"{100 * expected['t2a']['R@1']:.2f}"
    assert row.split()[5] == f"{100 * expected['a2t']['R@1']:.2f}"
    labels = manifest.parent / "labels.csv"
    labels.write_text("file_name,label\ndog.wav,dog\nrain.wav,rain\ndoor.wav,a door\n")
    assert main(["zeroshot", str(folder), "--data", str(labels)]) == 0
    assert "chance                 33.33" in capsys.readouterr().out


def test_chance_of_languages(manifest, tmp_path):
    """Two of nine clips have French captions, of which one has two."""
    french = {"dog": ["un chien", "encore un chien"], "rain": ["la pluie"]}
    lines = []
    for path in sorted(manifest.parent.glob("*.wav")):
        captions = {"eng": [f"a {path.stem}"], "fra": french.get(path.stem, [])}
        lines.append(json.dumps({"audio": str(path), "captions": captions}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    found = chance_of(load_corpus(tmp_path / "m.jsonl", 30.0))
    assert near(found["t2a"]["R@1"], 1 / 9)
    french_r1 = (2 / 3 + 1 / 3) / 2
    assert near(found["a2t"]["R@1"], (1 / 9 + french_r1) / 2)


def test_bfloat16_without_units(manifest, tmp_path, monkeypatch, capsys):
    for lacks, shown in ((True, 1), (False, 0)):
        monkeypatch.setattr(run, "lacks_bf16", lambda device, lacks=lacks: lacks)
        train(settings(manifest, tmp_path / f"{lacks}", epochs=1, precision="bf16"))
        assert capsys.readouterr().out.count("no units for bfloat16") == shown
    monkeypatch.setattr(ranks.platform, "machine", lambda: "x86_64")
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda s=supported: s)
        assert ranks.lacks_bf16(torch.device("cpu")) != supported
    assert not ranks.lacks_bf16(torch.device("cuda"))
    assert len(read_lines(tmp_path / "True/speed.jsonl")) == 1
