"""No work for nothing: pieces of similar length, frozen encoders, one decoding of a file."""

import io
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from clips import SMALL, log_of, near, settings
from interface_cases import close
from supclap import audio, batches, corpus, embeddings, pieces, run
from supclap.ced import CED
from supclap.check import check
from supclap.cli import main
from supclap.corpus import load_corpus
from supclap.errors import UserError
from supclap.model import SupclapModel, Tower, load_model
from supclap.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
UNEVEN = [9, 300, 17, 40, 12, 250, 31, 16, 60, 11, 90, 20, 8, 10, 13, 400] * 3


# ------------------------------------------------------------------------------------------ pieces


def test_pieces_are_rows_of_similar_length():
    found = pieces.pieces_of(UNEVEN)
    assert sorted(row for piece in found for row in piece) == list(range(len(UNEVEN)))
    assert len(found) == len(UNEVEN) // pieces.SMALLEST == 3
    for shorter, longer in zip(found, found[1:], strict=False):
        assert UNEVEN[shorter[-1]] <= UNEVEN[longer[0]]
    for even in ([7] * 64, [100, 95, 99, 97] * 16, [5], [3, 300], UNEVEN[:31]):
        assert pieces.pieces_of(even) == [list(range(len(even)))]


def encoders():
    model = SupclapModel(SMALL)
    tokens = model.text.encoder.tokenizer(["x" * n for n in UNEVEN], ["eng"] * len(UNEVEN))
    mel = batches.pad_features([10 * torch.randn(n, 64) - 40 for n in UNEVEN])
    yield "builtin audio", model.audio, mel
    yield "builtin text", model.text, tokens
    yield "ced", Tower(CED(width=16, heads=2, layers=1), torch.nn.Identity()), mel


@pytest.mark.parametrize("name", ["builtin audio", "builtin text", "ced"])
def test_a_batch_in_pieces_is_the_batch(name, monkeypatch):
    torch.manual_seed(0)
    tower, inputs = next((tower, x) for n, tower, x in encoders() if n == name)
    shapes, upstream = [], None
    tower.encoder.register_forward_pre_hook(lambda _, x: shapes.append(tuple(x[0].shape[:2])))
    found = []
    for worth in (pieces.WORTH, 0.0):
        monkeypatch.setattr(pieces, "WORTH", worth)
        tower.zero_grad()
        vectors = tower(*inputs)
        upstream = torch.randn_like(vectors) if upstream is None else upstream
        vectors.backward(upstream)
        gradients = [p.grad.clone() for p in tower.parameters() if p.grad is not None]
        found.append((vectors.detach(), torch.cat([g.flatten() for g in gradients])))
    lengths = sorted(min(n, 256) if "text" in name else n for n in UNEVEN)
    assert shapes == [*((16, lengths[n]) for n in (15, 31, 47)), (48, lengths[-1])]
    (some, of_some), (whole, of_whole) = found
    assert close(some, whole, 5e-7) and close(of_some, of_whole, 2e-5)


def test_a_batch_of_even_lengths_is_one_piece():
    """The same tensors, so the same bits."""
    tower, seen = SupclapModel(SMALL).audio, []
    tower.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    mel, lengths = torch.randn(64, 50, 64), torch.full((64,), 50)
    tower(mel, lengths)
    assert len(seen) == 1 and seen[0][0] is mel and seen[0][1] is lengths


def test_pieces_train_the_same(tmp_path, monkeypatch):
    """Fifty steps on clips of very different lengths, against whole batches."""
    rng, rows = np.random.default_rng(0), ["file_name,caption"]
    for n in range(48):
        length = int(16_000 * (0.1 + 1.9 * rng.uniform() ** 4))
        soundfile.write(tmp_path / f"{n}.wav", 0.1 * rng.standard_normal(length), 16_000)
        rows.append(f"{n}.wav,{'a sound ' * (1 + n % 7)}number {n}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    losses, pieces_of = [], pieces.pieces_of
    for name, change in (("pieces", pieces_of), ("whole", lambda x: [list(range(len(x)))])):
        counts = []
        monkeypatch.setattr(
            pieces, "pieces_of", lambda x, f=change, c=counts: c.append(len(f(x))) or f(x)
        )
        options = {"batch_size": 48, "epochs": 50, "svr": "bi-dynamic"}
        folder = train(settings(tmp_path / "m.csv", tmp_path / name, **options))
        losses.append([line["loss"] for line in log_of(folder)])
        assert max(counts) == (3 if name == "pieces" else 1)
    assert len(losses[0]) == 50 and near(*losses, within=1e-5 * max(losses[0]))


# --------------------------------------------------------------------------------- frozen encoders


@pytest.mark.parametrize("freeze", ["audio", "text", "both"])
def test_a_frozen_encoder_is_asked_once(manifest, tmp_path, monkeypatch, freeze):
    options = {"freeze": freeze, "epochs": 3, "batch_size": 6, "val": manifest}
    asked = []
    for side in ("audio", "text"):
        kind = type(getattr(SupclapModel(SMALL), side).encoder)
        forward = kind.forward

        def count(self, *inputs, side=side, forward=forward):
            asked.append((side, len(inputs[0])))
            return forward(self, *inputs)

        monkeypatch.setattr(kind, "forward", count)
    once = train(settings(manifest, tmp_path / "once", **options))
    for side, rows in (("audio", 9), ("text", 18)):
        calls = [n for name, n in asked if name == side]
        # of what is trained on, and of what is validated on
        assert calls == [rows, rows] if freeze in (side, "both") else sum(calls) >= 6 * rows
    monkeypatch.setattr(run, "encode_once", lambda model, corpus, *_: corpus)
    again = train(settings(manifest, tmp_path / "again", **options))
    for name in ("loss", "gap"):
        values = [[line[name] for line in log_of(folder)] for folder in (once, again)]
        assert near(*values, within=1e-5 * max(values[0]))
    recalls = [[line["t2a"]["R@1"] for line in log_of(folder, "val")] for folder in (once, again)]
    assert recalls[0] == recalls[1]
    assert load_model(once).state_dict().keys() == load_model(again).state_dict().keys()


def test_frozen_and_resumed(manifest, tmp_path):
    options = {"freeze": "audio", "batch_size": 6, "epochs": 4}
    whole = train(settings(manifest, tmp_path / "whole", **options))
    part = train(settings(manifest, tmp_path / "part", **options | {"epochs": 2}))
    train(settings(manifest, part, **options), resume=True)
    # The schedule knows the last epoch: compare what does not depend on it.
    assert [x["step"] for x in log_of(part)] == [x["step"] for x in log_of(whole)]
    assert log_of(part)[0]["loss"] == log_of(whole)[0]["loss"]


def test_what_is_cut_anew_each_time_is_encoded_each_time(manifest, tmp_path):
    model = SupclapModel(replace(SMALL, max_seconds=0.4))
    clips = load_corpus(manifest, 0.4)
    assert clips.longer.any()
    made = embeddings.encode_once(model, clips, ("audio", "text"))
    assert made.audio_outputs is None and made.text_outputs.shape == (18, 32)
    assert not made.text_outputs.is_inference() and not made.text_outputs.requires_grad


# ------------------------------------------------------------------------------- decoding, caching


def test_a_file_is_opened_once(manifest, monkeypatch):
    opened, SoundFile = [], soundfile.SoundFile  # noqa: N806 (the library's name)

    def count(source, *args, **kwargs):
        opened.append(source)
        return SoundFile(source, *args, **kwargs)

    monkeypatch.setattr(audio.soundfile, "SoundFile", count)
    load_corpus(manifest, 30.0)
    assert len(opened) == len(set(opened)) == 9


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_channels_are_averaged(channels):
    wave = np.random.default_rng(0).standard_normal((4_000, channels)).astype(np.float32)
    stream = io.BytesIO()
    soundfile.write(stream, wave, 16_000, format="WAV", subtype="FLOAT")
    stream.seek(0)
    assert np.array_equal(audio.load_audio(stream, 30.0), wave.mean(axis=1))


def test_one_changed_file_costs_one_file(manifest, tmp_path, monkeypatch):
    read, cache = [], str(tmp_path / "kept")
    read_clip = corpus.read_clip

    def count(clip, **options):
        read.append(clip.name)
        return read_clip(clip, **options)

    monkeypatch.setattr(corpus, "read_clip", count)
    first = load_corpus(manifest, 30.0, cache=cache)
    assert len(read) == 9 and len(list((tmp_path / "kept").iterdir())) == 1
    load_corpus(manifest, 30.0, cache=cache)
    assert len(read) == 9
    copy = tmp_path / "clips"
    copy.mkdir()
    for path in manifest.parent.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    copied = load_corpus(copy / "clips.csv", 30.0, cache=cache)  # other files
    assert len(read) == 18 and all(map(torch.equal, first.kept, copied.kept))
    soundfile.write(copy / "dog.wav", np.ones(8_000) * 0.1, 16_000)
    changed = load_corpus(copy / "clips.csv", 30.0, cache=cache)
    assert read[18:] == ["dog.wav"]
    differ = [not torch.equal(a, b) for a, b in zip(first.kept, changed.kept, strict=True)]
    assert differ == [True] + [False] * 8
    lines = (copy / "clips.csv").read_text().splitlines()
    (copy / "fewer.csv").write_text("\n".join([lines[0], *lines[3:], lines[1]]))
    fewer = load_corpus(copy / "fewer.csv", 30.0, cache=cache)  # some of them, in another order
    assert len(read) == 19 and torch.equal(fewer.kept[-1], changed.kept[0])
    for path in (tmp_path / "kept").iterdir():  # broken files are none
        path.write_bytes(path.read_bytes()[:200])
    assert torch.equal(load_corpus(manifest, 30.0, cache=cache).kept[0], first.kept[0])
    assert len(read) == 28


def test_what_could_not_be_read_is_tried_again(manifest, tmp_path, monkeypatch):
    cache, read_duration = str(tmp_path / "kept"), corpus.load_first

    def fails(source, *others):
        if b"/rain" in source:
            raise UserError("not readable as audio: Input/output error")
        return read_duration(source, *others)

    monkeypatch.setattr(corpus, "load_first", fails)
    assert len(load_corpus(manifest, 30.0, cache=cache, skip_bad_audio=True).clips) == 8
    monkeypatch.undo()
    assert len(load_corpus(manifest, 30.0, cache=cache).clips) == 9


def test_check_shows_how_far_it_is(manifest, capsys):
    assert check(manifest, workers=1) == check(manifest)
    assert main(["check", str(manifest), "--workers", "2"]) == 0
    assert "decoding clips.csv: 100%" in capsys.readouterr().err
    assert main(["check", str(manifest), "--workers", "0"]) == 2
