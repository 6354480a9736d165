"""The reproduction on recordings: splits that leak are refused, the rest is compared."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import soundfile
from covering import in_all
from supclap.cli import main
from supclap.errors import UserError
from supclap.leaks import leaks
from supclap.logs import read_lines
from supclap.manifest import read_manifest
from supclap.reproduction.corpora import line_of, manifest_of, take_recordings
from supclap.reproduction.experiments import CONTENDERS, SVR, plan_experiments
from supclap.reproduction.presets import PRESETS
from supclap.synth import synthesise

TINY = replace(
    PRESETS["smoke"], clips=0, seeds=2, few=2, main_only=True, epochs=1, validate_every=2
)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A folder of manifests, in two languages."""
    folder = tmp_path_factory.mktemp("recordings")
    synthesise(folder, 60, 0, languages=("eng", "fra"), captions=1)
    for path in (*folder.glob("*.csv"), folder / "scenes.jsonl"):
        path.unlink(missing_ok=True)
    for split in ("val", "test"):  # scenes of one kind are described in the same words
        lines = read_lines(folder / f"{split}.jsonl")
        for n, line in enumerate(lines):
            for language, texts in line["captions"].items():
                line["captions"][language] = [f"{text} {n}" for text in texts]
        write(folder / f"{split}.jsonl", lines)
    return folder


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def clips_of(folder, **named):
    """Manifests of (sound, captions by language): their clips."""
    for split, clips in named.items():
        lines = []
        for n, (sound, captions) in enumerate(clips):
            name = f"{split}-{n}.wav"
            soundfile.write(folder / name, [0.001 * sound] * 1600, 16_000)
            lines.append({"audio": name, "captions": captions})
        write(folder / f"{split}.jsonl", lines)
    return [read_manifest(folder / f"{split}.jsonl") for split in named]


def test_what_leaks(tmp_path):
    train, test = clips_of(
        tmp_path,
        train=[(1, {"eng": ["A frog."]}), (2, {"fra": ["Une  grenouille"]}), (3, {"eng": ["Bee"]})],
        test=[
            (4, {"eng": ["a FROG"]}),  # the same sentence
            (5, {"eng": ["A dog", "Une grenouille"]}),  # ... of another language is another one
            (6, {"eng": ["A cat"], "fra": ["UNE GRENOUILLE ."]}),
            (3, {"eng": ["A wasp"]}),  # the same sound
            (7, {"eng": ["A frog and a bee"]}),
        ],
    )
    found = leaks(train, test)
    assert [re.search(r"/test-(\d)", line)[1] for line in found] == ["0", "2", "3"]
    assert "has the caption 'a FROG' of" in found[0] and "sounds like" in found[2]


def test_recordings_that_leak_are_refused(tmp_path):
    clips_of(
        tmp_path,
        train=[(1, {"eng": ["A frog."]})],
        val=[(2, {"eng": ["A dog"]})],
        test=[(3, {"eng": ["a frog"]})],
    )
    with pytest.raises(UserError, match="1 clips of test are known from train, such as"):
        take_recordings(tmp_path, tmp_path / "out", TINY)
    assert not (tmp_path / "out").exists()


def test_manifests_are_found_and_taken_wherever_their_clips_are(recordings, tmp_path):
    take_recordings(recordings, tmp_path / "out", TINY)
    for split in ("train", "val", "test"):
        before = read_manifest(recordings / f"{split}.jsonl")
        after = read_manifest(tmp_path / "out/here" / f"{split}.jsonl")
        assert [(x.captions, x.languages) for x in before] == [
            (x.captions, x.languages) for x in after
        ]
        assert all(a.path.samefile(b.path) for a, b in zip(before, after, strict=True))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="needs one manifest train"):
        manifest_of(other, "train")
    for suffix in (".csv", ".jsonl"):
        (other / f"train{suffix}").touch()
    with pytest.raises(UserError, match="it has 2"):
        manifest_of(other, "train")
    clip = replace(read_manifest(recordings / "test.jsonl")[0], span=(0, 1))
    with pytest.raises(UserError, match="not clips inside of one"):
        line_of(clip)


def test_the_plan_of_recordings_has_the_main_comparisons():
    preset = PRESETS["real"]
    assert preset.seeds >= 10 and preset.few == preset.seeds
    plan = plan_experiments(preset)
    others = len(SVR) * (len(CONTENDERS) - 1)  # one of these readings is the chosen one
    assert len(plan) == preset.seeds * (2 * 3 + 2 + len(preset.rates) + others)
    assert {run.data for run in plan} == {"here/train"}


def test_a_preset_or_recordings(tmp_path, capsys):
    for arguments in ([], ["--preset", "smoke", "--real", str(tmp_path)]):
        with pytest.raises(SystemExit):
            main(["reproduce", "--out", str(tmp_path / "x"), *arguments])


@in_all
def test_a_report_of_recordings(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "real", TINY)
    out = tmp_path / "out"
    command = ["reproduce", "--real", str(recordings), "--out", str(out), "--jobs", "2"]
    assert main(command) == 0
    report, results = (
        (out / "report.md").read_text(),
        json.loads((out / "results.json").read_text()),
    )
    assert report.startswith("# SupCLAP on recordings") and "2 languages" in report
    titles = [table["title"] for table in results["tables"]]
    assert "Readings of the radius" in titles and "Zero-shot" not in titles
    assert len(results["verdicts"]) >= 15
    assert all(1 <= len(verdict["differences"]) <= 2 for verdict in results["verdicts"])
    other = tmp_path / "elsewhere"
    shutil.copytree(recordings, other)
    command[2] = str(other)
    assert main(command) == 2
    assert "holds runs of other settings" in capsys.readouterr().err
