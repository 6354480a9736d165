"""Runs that are stopped, moved, extended or begun from; and runs that train nothing."""

import json
import unicodedata
from dataclasses import replace

import pytest
import soundfile
import torch
from clips import Stop, log_of, settings, stopped_at
from supclap.checkpoint import FINISHED, STATE
from supclap.cli import main
from supclap.config import read_config
from supclap.corpus import digest
from supclap.manifest import read_manifest
from supclap.model import load_model
from supclap.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


def stopped(monkeypatch, config, step):
    """The folder of a run that died after so many steps."""
    with monkeypatch.context() as patch:
        stopped_at(patch, step)
        with pytest.raises(Stop):
            train(config)
    return config.out


def copied(manifest, folder, text=None):
    folder.mkdir(parents=True)
    for path in manifest.parent.glob("*.wav"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "other.csv").write_text(manifest.read_text() if text is None else text)
    return folder / "other.csv"


@pytest.mark.parametrize("absolute", [False, True])
def test_a_run_goes_on_with_data_that_moved(manifest, tmp_path, monkeypatch, absolute):
    options = {"batch_size": 4, "checkpoint_every": 2, "val": manifest}
    whole = train(settings(manifest, tmp_path / "whole", **options))
    before = copied(manifest, tmp_path / "before")
    if absolute:
        header, *rows = before.read_text().splitlines()
        before.write_text("\n".join([header, *(f"{before.parent}/{row}" for row in rows)]))
    config = settings(before, tmp_path / "run", **(options | {"val": before}))
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
    records = [[c.name, c.captions, c.languages] for c in read_manifest(other)]
    assert state.pop("pairs") and state["data"] != digest(records)
    torch.save(state | {"data": digest(records)}, run / STATE)
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


def test_a_finished_run_is_extended(manifest, tmp_path, capsys):
    """With a constant rate the run is the one that was longer from the start."""
    options = {"batch_size": 4, "schedule": "constant", "warmup": 0.0, "val": manifest}
    whole = train(settings(manifest, tmp_path / "whole", epochs=4, **options))
    run = train(settings(manifest, tmp_path / "run", epochs=2, **options))
    assert main(["train", "--resume", str(run), "--epochs", "2"]) == 2
    message = capsys.readouterr().err
    assert "is finished; go on with more than its --epochs 2, or begin" in message
    assert main(["train", "--resume", str(run), "--epochs", "4"]) == 0
    assert "NOTE" not in capsys.readouterr().out
    for name in ("log", "val"):
        assert log_of(run, name) == log_of(whole, name)
    ours, theirs = load_model(run).state_dict(), load_model(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_config(run).epochs == 4 and not (run / STATE).exists()
    assert main(["train", "--resume", str(run), "--epochs", "3"]) == 2
    assert "more than its --epochs 4" in capsys.readouterr().err


def test_more_epochs_change_the_learning_rate(manifest, tmp_path, capsys, monkeypatch):
    run = train(settings(manifest, tmp_path / "run", batch_size=6, epochs=2))
    assert main(["train", "--resume", str(run), "--epochs", "4"]) == 0
    shares = [line["lr"] / read_config(run).lr for line in log_of(run)]
    assert shares[5] < 0.2 * shares[6] and len(shares) == 12
    told = f"NOTE: 4 epochs instead of 2: the learning rate goes on at {100 * shares[6]:.0f} % of "
    assert told + "its peak, which would have been at 0 %\n" in capsys.readouterr().out
    config = settings(manifest, tmp_path / "other", batch_size=6, epochs=4)
    other = stopped(monkeypatch, replace(config, checkpoint_every=3), 6)
    assert main(["train", "--resume", str(other), "--epochs", "2"]) == 0
    assert "NOTE" not in capsys.readouterr().out and len(log_of(other)) == 6


@pytest.mark.parametrize("steps", [0, 2])
def test_an_extension_that_is_stopped_goes_on(manifest, tmp_path, monkeypatch, steps):
    options = {"batch_size": 4, "checkpoint_every": 1}
    run = train(settings(manifest, tmp_path / "run", epochs=1, **options))
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
    first = train(settings(manifest, tmp_path / "first", learn_tau=True, batch_size=4))
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
    train(settings(manifest, tmp_path / "third", svr="bi-dynamic", init=first, epochs=1))
    assert "has no such radius: this one begins anew" in capsys.readouterr().out
    (first / "model.safetensors").unlink()
    assert main([*arguments, "--overwrite"]) == 2
    assert "it has no model.safetensors" in capsys.readouterr().err


def test_a_run_that_trains_nothing_says_so(manifest, tmp_path, capsys):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "dog.wav").write_bytes((manifest.parent / "dog.wav").read_bytes())
    rows = manifest.read_text().splitlines()
    (folder / "one.csv").write_text("\n".join(rows[:2]))
    note = "no pair of a batch has a negative"
    for options, expected in (
        ({"batch_size": 1}, True), ({"batch_size": 2}, False),
        ({"batch_size": 1, "loss": "siglip"}, False),
        ({"data": folder / "one.csv"}, True), ({"data": folder / "one.csv", "ids": "none"}, False),
    ):  # fmt: skip
        changes = {"epochs": 1, "overwrite": True, "data": manifest, **options}
        train(settings(changes.pop("data"), tmp_path / "run", **changes))
        assert (note in capsys.readouterr().out) == expected, options
    train(settings(manifest, tmp_path / "run", epochs=1, overwrite=True, val=folder / "one.csv"))
    printed = capsys.readouterr().out
    assert "has one clip, which every model finds: the first epoch is kept" in printed
    assert json.loads((tmp_path / "run" / FINISHED).read_text())["epochs"] == 1


def test_a_search_hears_what_the_decoder_reads(manifest, tmp_path, capsys):
    run = train(settings(manifest, tmp_path / "run", epochs=1))
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
