"""The reproduction: its statistics, its corpora, a small one that is interrupted; the demo."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import torch
from clips import near
from covering import in_all
from supclap.cli import main
from supclap.config import TrainConfig
from supclap.errors import UserError
from supclap.evaluate import chance, evaluate_run
from supclap.logs import read_lines
from supclap.manifest import read_manifest
from supclap.reproduction import experiments, report
from supclap.reproduction import run as module
from supclap.reproduction.controls import CONTROLS, Control
from supclap.reproduction.corpora import with_noise
from supclap.reproduction.difficulty import HARD, radius_by_hard
from supclap.reproduction.experiments import (
    CHOSEN,
    CONTENDERS,
    HERE,
    LITERAL,
    LOSSES,
    MAIN,
    PRESETS,
    READINGS,
    SVR,
    Experiment,
    plan_experiments,
)
from supclap.reproduction.findings import Findings
from supclap.reproduction.verdicts import T_95, Verdict, interval, mean_and_deviation
from supclap.step import build_loss
from supclap.synth import EVENTS, synthesise, synthesise_events
from supclap.train import train
from supclap.zeroshot import labelled_clips


def test_intervals_by_hand():
    values = [1.0, 2.0, 3.0, 6.0]
    mean, deviation = mean_and_deviation(values)
    assert near([mean, deviation], [3.0, math.sqrt(14 / 3)])
    low, high = interval(values)
    half = 3.182 * deviation / 2
    assert near([low, high], [3 - half, 3 + half])
    stats = pytest.importorskip("scipy.stats")
    for freedom, point in enumerate(T_95[1:], 1):
        assert near(point, stats.t.ppf(0.975, freedom), within=5e-4)


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([1.0, 1.1, 0.9], "holds"),
        ([-1.0, -1.1, -0.9], "does not hold"),
        ([1.0, -1.1, 0.9], "undecided"),
        ([5.0], "undecided"),  # one run decides nothing
        ([0.0, 0.0, 0.0], "undecided"),
    ],
)
def test_verdicts(differences, word):
    verdict = Verdict("a claim", "points", differences)
    assert verdict.word == word == verdict.as_json()["verdict"]
    beginnings = {"holds": "It holds here", "does not hold": "It does not hold here"}
    assert verdict.sentence().startswith(beginnings.get(word, "Undecided by these seeds"))
    assert json.loads(json.dumps(verdict.as_json()))["differences"] == differences


def test_the_plan_has_every_loss_and_sweep():
    for preset in PRESETS.values():
        if preset.main_only:  # test_real.py
            continue
        runs = plan_experiments(preset)
        assert len({run.folder for run in runs}) == len(runs)

        def seeds(name, data=HERE, runs=runs, **changes):
            folders = {Experiment(name, seed, data, changes).folder for seed in range(20)}
            return sum(run.folder in folders for run in runs)

        few, main = preset.few, preset.seeds
        assert all(seeds(name) == (main if name in MAIN else few) for name in LOSSES)
        assert all(seeds(name, epochs=preset.long * preset.epochs) == main for name in MAIN)
        assert all(seeds(name, **LITERAL) == main for name in MAIN[1:])
        assert all(seeds(MAIN[0], lr=rate * preset.lr) == main for rate in preset.rates)
        assert all(seeds(name) == few for name in CONTROLS)
        for reading in READINGS.values():
            for init in preset.inits:
                start = {**reading, "radius_init": min(init, 0.9) if "gap" in reading.values()
                         else init}  # fmt: skip
                assert all(seeds(name, **start) >= few for name in MAIN[1:])
        for words, init in CONTENDERS.items():
            contender = {**READINGS[words], "radius_init": init}
            for rate in preset.other_rates:
                assert all(seeds(name, **contender, lr=rate * preset.lr) == few for name in SVR)
            assert all(seeds(name, **contender) >= few for name in SVR)
        for noise in preset.noises:
            assert all(seeds(name, f"here/noise{noise}") == few for name in MAIN)
    cpu = PRESETS["cpu"]
    assert cpu.seeds >= 10 and cpu.few >= 5 and len(cpu.languages) == 8 and cpu.batch_size == 24
    assert cpu.inits == (0.1, 0.5, 1.0) and cpu.rates == (0.5, 2.0, 4.0) and len(LOSSES) == 10


def test_equal_trainings_are_one():
    """Of two purposes: a reading that is the chosen one, settings that say what is usual."""
    usual = Experiment("bi-StaticSVR", 3)
    assert Experiment("bi-StaticSVR", 3, changes=CHOSEN).folder == usual.folder
    assert Experiment("bi-StaticSVR", 3, changes={"alpha": 1.0}).folder == usual.folder
    for others in ({"alpha": 2.0}, {"batch_size": 64}, {"epochs": 2}, LITERAL):
        assert Experiment("bi-StaticSVR", 3, changes=others).folder != usual.folder
    assert Experiment("bi-StaticSVR", 3, "there/train").folder != usual.folder
    preset, out = PRESETS["cpu"], Path("out")
    config = experiments.settings_of(usual, out, preset)
    assert {name: getattr(config, name) for name in CHOSEN} == CHOSEN
    for loss, beta in (("bi-DynamicSVR", 0.01), ("bi-StaticSVR", 0.0)):  # the paper's
        literal = experiments.settings_of(Experiment(loss, 0, changes=LITERAL), out, preset)
        assert {name: getattr(literal, name) for name in LITERAL} == LITERAL | {"beta": beta}
    assert experiments.INIT in preset.inits and CHOSEN == READINGS[experiments.READING] | {
        "radius_init": experiments.INIT
    }
    control = Experiment(next(iter(CONTROLS)), 0)
    assert experiments.settings_of(control, out, preset).svr == "none"
    assert isinstance(experiments.criterion_of(control)(config, 4), Control)


def test_wrong_captions_are_those_of_others(tmp_path):
    lines = [{"audio": f"{n}.wav", "captions": {"eng": [f"caption {n}"]}} for n in range(50)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for share in (0.1, 0.4):
        (tmp_path / "noisy.jsonl").write_text(with_noise(path, share))
        noisy = read_lines(tmp_path / "noisy.jsonl")
        assert [line["audio"] for line in noisy] == [line["audio"] for line in lines]
        wrong = sum(a != b for a, b in zip(noisy, lines, strict=True))
        assert wrong == round(50 * share)
        captions = sorted(line["captions"]["eng"][0] for line in noisy)
        assert captions == sorted(line["captions"]["eng"][0] for line in lines)


def test_single_events_have_their_labels(tmp_path):
    synthesise_events(tmp_path, each=2)
    clips, labels, _ = labelled_clips(tmp_path / "labels.csv")
    assert len(clips) == 2 * len(EVENTS) and all(clip.path.is_file() for clip in clips)
    assert len(set(labels)) == len(EVENTS) and "a click" in labels


@in_all
def test_a_small_reproduction_is_interrupted_and_goes_on(tmp_path):
    """Ctrl-C after some runs; the same command does the rest; a third does nothing; the report
    follows from the results."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "supclap", "reproduce", "--preset", "smoke", "--out", str(out)]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, "--jobs", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while len(list(out.glob("runs/*/result.json"))) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed, message = process.communicate(timeout=60)
    assert process.returncode == 130, message[-2000:]
    assert "the same command goes on" in message and "Traceback" not in message
    done = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    assert 5 <= len(done) < len(plan_experiments(PRESETS["smoke"]))

    assert main(["reproduce", "--preset", "smoke", "--out", str(out), "--jobs", "2"]) == 0
    assert time.monotonic() - start < 180
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    runs = plan_experiments(PRESETS["smoke"])
    assert len(list(out.glob("runs/*/result.json"))) == len(runs)
    first = (out / "report.md").read_text()
    assert main(["reproduce", "--preset", "smoke", "--out", str(out)]) == 0
    assert (out / "report.md").read_text() == first

    for name in ("figure-1-drift", "figure-7-hard-negatives", "summary"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    for verdict in results["verdicts"]:
        assert verdict["claim"] in first
        low, high = verdict["interval95"] or (-math.inf, math.inf)
        word = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        assert verdict["verdict"] == word
    titles = [table["title"] for table in results["tables"]]
    assert titles[:5] == [
        "Ablation", "Readings of the radius", "Readings that could be the default", "Controls",
        "At equal steps and at rest",
    ]  # fmt: skip
    assert all(f"### {title}" in first for title in titles) and len(titles) == 14
    assert len(results["tables"][1]["rows"]) == 3 * len(READINGS) + 2  # every reading
    assert len(results["tables"][2]["rows"]) == 2 * 2 * len(CONTENDERS)  # at two learning rates

    # The claims, recomputed from the runs' own files.
    def folder(name, seed, **changes):
        return out / "runs" / Experiment(name, seed, changes=changes).folder

    def recall_of(path):
        return (path["t2a"]["R@1"] + path["a2t"]["R@1"]) / 2

    def tested(*which, **changes):
        return 100 * recall_of(
            json.loads((folder(*which, **changes) / "result.json").read_text())["here"]
        )

    def curve(*which, **changes):
        lines = read_lines(folder(*which, **changes) / "val.jsonl")
        return [(line["step"], recall_of(line)) for line in lines]

    by_claim = {verdict["claim"]: verdict["differences"] for verdict in results["verdicts"]}
    rates = {1.0: {}, 2.0: {"lr": 2e-3}}

    def by_validation(rate):
        curves = [curve("InfoNCE", seed, **rates[rate]) for seed in range(2)]
        return sum(max(recall for _, recall in one) for one in curves)

    best = max(rates, key=by_validation)
    assert results["best_rate"] == best
    differences = [
        tested("bi-DynamicSVR", s) - tested("InfoNCE", s, **rates[best]) for s in range(2)
    ]
    claim = "bi-DynamicSVR retrieves better than the best InfoNCE at equal steps"
    assert near(by_claim[claim], differences, within=1e-9)
    claim = "bi-DynamicSVR retrieves better than InfoNCE, both with 2 times the steps"
    long = [tested("bi-DynamicSVR", s, epochs=4) - tested("InfoNCE", s, epochs=4) for s in range(2)]
    assert near(by_claim[claim], long, within=1e-9)
    radii = [
        [line["radius"] for line in read_lines(folder("bi-StaticSVR", s) / "log.jsonl")]
        for s in range(2)
    ]
    falls = [of_run[1] - of_run[-1] for of_run in radii]  # of 10 to 19 steps a tenth is one
    claimed = by_claim["the radius falls after the first tenth of training (bi-StaticSVR)"]
    assert near(claimed, falls, within=1e-9)

    def first_at_the_goal(curves):
        goal = min(max(recall for _, recall in curve) for curve in curves)
        return min(step for step, recall in curves[0] if recall >= goal)

    curves = [(curve("bi-DynamicSVR", s), curve("InfoNCE", s, **rates[best])) for s in range(2)]
    sooner = [first_at_the_goal(pair[::-1]) - first_at_the_goal(pair) for pair in curves]
    assert by_claim["bi-DynamicSVR converges faster than the best InfoNCE"] == sooner
    measured = Findings(out, PRESETS["smoke"]).runs("bi-DynamicSVR")[0]
    assert list(measured["radius_by_hard"]) == [str(k) for k in HARD if k < 12]  # clips
    assert len(measured["similarities"]) == experiments.BINS
    assert sum(measured["similarities"]) == len(read_manifest(out / "here/test.jsonl")) * 2

    with pytest.raises(UserError, match="holds runs of other settings"):
        experiments.check_settings(out, "cpu")


def test_a_run_that_fails_is_named(tmp_path, monkeypatch, capsys):
    bad = Experiment("InfoNCE", 0, changes={"lr": -1.0})
    monkeypatch.setattr(module, "plan_experiments", lambda preset: [bad])
    monkeypatch.setattr(module, "make_corpora", lambda out, preset: None)
    assert main(["reproduce", "--preset", "smoke", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "lr--1.0_svr-none_seed-0: UserError: --lr must be a positive number" in message
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    for arguments, expected in (
        (["--out", str(tmp_path / "other")], "not empty and not an earlier reproduction"),
        (["--out", str(tmp_path / "x"), "--jobs", "0"], "--jobs must be at least 1"),
    ):
        assert main(["reproduce", "--preset", "smoke", *arguments]) == 2
        assert expected in capsys.readouterr().err


def test_the_radius_is_told_by_hard_negatives(tmp_path):
    """A predictor that returns its largest negative sees the hard ones."""
    torch.manual_seed(0)
    config = replace(
        experiments.settings_of(
            Experiment("bi-DynamicSVR", 0, changes=LITERAL), tmp_path, PRESETS["smoke"]
        ),
        batch_size=8,
    )
    audio = torch.nn.functional.normalize(torch.randn(40, 16), dim=1)
    text = torch.nn.functional.normalize(audio + 0.1 * torch.randn(40, 16), dim=1)
    criterion = build_loss(config, 8)
    with torch.no_grad():
        for p in criterion.radius.network.parameters():
            p.zero_()
        first, _, middle, _, last = criterion.radius.network
        first.weight[0, 1] = middle.weight[0, 0] = last.weight[0, 0] = 1.0
    config.out.mkdir(parents=True)
    from supclap.model import SupclapModel, save_model

    save_model(config.out / "model.safetensors", SupclapModel(config.model), criterion=criterion)
    radius = experiments.trained_radius(config)
    with torch.no_grad():
        radius_of = radius_by_hard(radius, config, text, audio, torch.arange(40))
    assert list(radius_of) == ["0", "6"] and radius_of["6"] > radius_of["0"]
    rows = [(audio @ t).topk(2).values[1].item() / 0.07 for t in text]
    gelu = torch.nn.functional.gelu
    expected = gelu(gelu(torch.tensor(rows))).mean().item()
    assert near(radius_of["6"], expected, within=0.02 * expected)


def test_the_demo_model_finds_what_it_heard(tmp_path, one_thread):
    """200 test clips, hard negatives among them: R@1 ten times chance, R@10 three times."""
    corpus = tmp_path / "corpus"
    synthesise(corpus)
    demo = signature(report.demo).parameters  # its settings
    assert demo["clips"].default == signature(synthesise).parameters["clips"].default
    train(
        TrainConfig(
            data=corpus / "train.csv", val=corpus / "val.csv", out=tmp_path / "run",
            epochs=demo["epochs"].default, seed=demo["seed"].default, svr="bi-static",
        )
    )  # fmt: skip
    metrics, test = evaluate_run(tmp_path / "run", corpus / "test.csv")
    assert len(test.clips) >= 200
    scenes = read_lines(corpus / "scenes.jsonl")
    assert {s["variant"] for s in scenes if s["split"] == "test"} == {"base", "order", "count"}
    by_chance = chance(test.clip_of)
    for way in ("t2a", "a2t"):
        assert metrics[way]["R@1"] >= 10 * by_chance[way]["R@1"]
        assert metrics[way]["R@10"] >= 3 * by_chance[way]["R@10"]
