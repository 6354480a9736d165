"""Training against more than the batch: past pairs, and captions that are wrong for a clip."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from clips import SMALL, WORDS, Stop, log_of, near, settings, stopped_at
from supclap import load, step
from supclap.batches import Epoch
from supclap.check import check
from supclap.checkpoint import Progress, load_state, save_state
from supclap.cli import main
from supclap.corpus import load_corpus
from supclap.errors import UserError
from supclap.manifest import read_manifest
from supclap.model import load_model
from supclap.train import train

from supclap_kernels import Negatives, Queue, svr_loss_reference

pytestmark = pytest.mark.usefixtures("one_thread")
STILL = {"lr": 1e-30, "epochs": 1, "svr": "none"}


@pytest.fixture(scope="module")
def wrong(manifest):
    """The first six clips have wrong captions: one, or two."""
    rows = []
    for n, word in enumerate(WORDS):
        row = {"audio": f"{word}.wav", "captions": [f"the sound of a {word}", f"we hear a {word}"]}
        if n < 6:
            row["hard_negatives"] = [f"no {word}", f"not a {word}"][: 1 + n % 2]
        rows.append(row)
    path = manifest.with_name("wrong.jsonl")
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# ------------------------------------------------------------------------------------- past pairs


def test_past_pairs_are_negatives(manifest, tmp_path):
    """Of the second step and on; those of the same clip are none."""
    losses = {}
    for queue, ids in ((0, "both"), (6, "both"), (100, "both"), (100, "none")):
        options = {**STILL, "batch_size": 6, "queue": queue, "ids": ids}
        run = train(settings(manifest, tmp_path / f"{queue}-{ids}", **options))
        losses[queue, ids] = [line["loss"] for line in log_of(run)]
    for each in losses.values():
        assert len(each) == 3
    assert losses[0, "both"][0] == losses[6, "both"][0] == losses[100, "both"][0]
    for before, after in ((0, 6), (6, 100)):
        assert losses[before, "both"][2] < losses[after, "both"][2]
    assert losses[6, "both"][1] == losses[100, "both"][1]
    assert losses[100, "both"][2] < losses[100, "none"][2]


def test_ids_last_from_batch_to_batch(manifest):
    corpus = load_corpus(manifest, 30.0)
    found = {}
    for number in (1, 2):
        epoch = Epoch(
            corpus, lambda texts, codes: (torch.zeros(len(texts)),), 4, 0, number,
            ids="both", lasting=True,
        )  # fmt: skip
        for n, part in enumerate(epoch.parts):
            for pair, of in zip(part.tolist(), epoch.batch(n).ids.tolist(), strict=True):
                assert found.setdefault(pair, of) == of
    assert len(found) == 18 and len(set(found.values())) == 9


def test_the_queue_is_resumed(manifest, tmp_path, monkeypatch):
    options = {"batch_size": 6, "epochs": 3, "queue": 10}
    whole = train(settings(manifest, tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        stopped_at(patch, 4)
        with pytest.raises(Stop):
            train(settings(manifest, tmp_path / "part", checkpoint_every=1, **options))
    train(settings(manifest, tmp_path / "part", checkpoint_every=1, **options), resume=True)
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("whole", "part")]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    state = torch.load(whole / "finished.pt", weights_only=True)["queue"][0]
    assert state["audio"].shape == (10, 32)


def test_a_queue_has_the_vectors_of_both(manifest, tmp_path):
    run = train(settings(manifest, tmp_path / "run", batch_size=6, queue=10, **STILL))
    state = torch.load(run / "finished.pt", weights_only=True)["queue"][0]
    model = load(run)
    corpus = load_corpus(manifest, 30.0)
    sounds = model.embed_audio([clip.path for clip in corpus.clips])
    captions = model.embed_text(corpus.captions)
    for held, vectors in ((state["audio"], sounds), (state["text"], captions)):
        assert len(held) == 10 and ((held @ vectors.T).amax(dim=1) > 0.999).all()


def test_in_pieces_with_a_queue(manifest, tmp_path):
    options = {"batch_size": 6, "epochs": 2, "queue": 10}
    runs = [
        train(settings(manifest, tmp_path / str(size), micro_batch_size=size, **options))
        for size in (None, 4)
    ]
    losses = [[line["loss"] for line in log_of(run)] for run in runs]
    assert near(*losses, within=1e-5)


def test_a_queue_that_cannot_be(manifest, tmp_path, capsys):
    flags = ["--data", str(manifest), "--out", str(tmp_path / "run"), "--queue", "-1"]
    assert main(["train", *flags]) == 2
    assert "--queue must not be negative" in capsys.readouterr().err


# ------------------------------------------------------------------------------- wrong captions


def test_wrong_captions_of_every_kind_of_manifest(manifest, wrong):
    expected = [clip.wrong for clip in read_manifest(wrong)]
    assert expected[:3] == [("no dog",), ("no rain", "not a rain"), ("no door",)]
    assert expected[6:] == [(), (), ()] and check(wrong)[1] == []
    assert not any("unused" in line for line in check(wrong)[0])
    table = manifest.with_name("wrong.csv")
    rows = ["file_name,caption,hard_negative,hard_negative_2"]
    for n, word in enumerate(WORDS):
        first, second = (f"no {word}", f"not a {word}") if n < 6 else ("", "")
        rows.append(f"{word}.wav,a {word},{first},{second if n % 2 else ''}")
    table.write_text("\n".join(rows))
    assert [clip.wrong for clip in read_manifest(table)] == expected
    assert not any("unused" in line for line in check(table)[0])
    held = [json.loads(line) for line in wrong.read_text().splitlines()]
    names = ("audio", "captions", "hard_negatives")
    columns = {name: [row.get(name) for row in held] for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), manifest.with_name("wrong.parquet"))
    assert [clip.wrong for clip in read_manifest(manifest.with_name("wrong.parquet"))] == expected
    table.write_text("\n".join([*rows, "dog.wav,another,no cat,"]))  # rows of one file
    assert read_manifest(table)[0].wrong == ("no dog", "no cat")


def test_wrong_captions_that_cannot_be(manifest):
    path = manifest.with_name("bad.jsonl")
    path.write_text(json.dumps({"audio": "dog.wav", "caption": "a dog", "hard_negatives": [1]}))
    with pytest.raises(UserError, match="hard_negatives must be a string"):
        read_manifest(path)


def test_they_are_counted(wrong, manifest, tmp_path, capsys):
    assert not any("negatives" in line for line in check(manifest)[0])
    count = sum(len(clip.wrong) for clip in read_manifest(wrong))
    assert count and check(wrong)[0].count(f"hard negatives: {count}") == 1
    train(settings(wrong, tmp_path / "run", epochs=1))
    assert f"18 pairs, {count} hard negatives, " in capsys.readouterr().out


def test_the_loss_has_them_for_columns(wrong, tmp_path):
    """Against the reference on the model's own embeddings."""
    run = train(settings(wrong, tmp_path / "run", batch_size=18, **STILL))
    model, corpus = load_model(run), load_corpus(wrong, 30.0)
    epoch = Epoch(corpus, model.text.encoder.tokenizer, 18, 0, 1, ids="both")
    batch = epoch.batch(0)
    assert batch.pairs == 18 and batch.has_wrong
    assert len(batch.text[0]) == 18 + 12  # a wrong one for each pair of six clips
    with torch.no_grad():
        audio, text = model.audio(*batch.audio), model.text(*batch.text)
    negatives = Negatives(text=text[18:])
    wanted = svr_loss_reference(
        audio, text[:18], None, 1 / 0.07, ids=batch.ids, negatives=negatives
    )
    assert near(log_of(run)[0]["loss"], wanted, within=1e-5)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("ids", ["clip", "caption", "both", "none"])
def test_a_true_caption_of_another_clip(manifest, ids, lasting):
    """It is wrong for its own clip, and no negative of the one that has it."""
    rows = [{"audio": f"{w}.wav", "caption": f"a {w}"} for w in WORDS]
    rows[0]["hard_negatives"] = ["A  RAIN."]
    rows[1] |= {"hard_negatives": ["nothing at all"], "lang": "fra"}
    path = manifest.with_name("mined.jsonl")
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = load_corpus(path, 30.0)
    texts, languages = [], []

    def tokenizer(captions, codes):
        texts[:], languages[:] = captions, codes
        return (torch.zeros(len(captions)),)

    epoch = Epoch(corpus, tokenizer, 9, ids=ids, lasting=lasting)
    batch = epoch.batch(0)
    assert sorted(zip(texts[9:], languages[9:], strict=True)) == [
        ("A RAIN.", "eng"), ("nothing at all", "fra"),
    ]  # fmt: skip
    if ids == "none":
        assert batch.wrong_ids is None is batch.ids
        return
    of = dict(zip(texts[9:], batch.wrong_ids.tolist(), strict=True))
    rain = int(batch.ids[texts.index("a rain")])
    assert of == {"A RAIN.": -1 if ids == "clip" else rain, "nothing at all": -1}


class TwoRanks:
    """The first of two, or the second; what the other one says is known."""

    count = 2

    def __init__(self, rank, other=None):
        self.rank, self.other = rank, other

    def each(self, value):
        other = self.other.state_dict() if isinstance(value, dict) else value
        return [value, other] if self.rank == 0 else [other, value]


class NoCorpus:
    hashes, fingerprint = [], "x"

    def fits(self, fingerprint):
        return True


def test_every_rank_has_its_queue_back(tmp_path):
    queues, device, corpora = [Queue(4), Queue(4)], torch.device("cpu"), {"data": NoCorpus()}
    for rank, queue in enumerate(queues):
        queue.push(torch.full((2, 3), float(rank)), torch.zeros(2, 3))
    first = TwoRanks(0, queues[1])
    save_state(tmp_path, {"queue": queues[0]}, corpora, Progress(), first, device)
    for rank in (0, 1):
        queue = Queue(4)
        load_state(tmp_path, {"queue": queue}, corpora, TwoRanks(rank), device)
        assert queue.audio.tolist() == [[rank] * 3] * 2


def test_each_epoch_draws_one_of_them(wrong):
    corpus = load_corpus(wrong, 30.0)

    def drawn(number, **options):
        captions = []

        def tokenizer(texts, codes):
            captions.extend(texts)
            return (torch.zeros(len(texts)),)

        epoch = Epoch(corpus, tokenizer, 18, 0, number, **options)
        epoch.batch(0)
        return captions

    every = [drawn(number) for number in range(1, 9)]
    for captions in every:
        assert all(text.startswith("no") for text in captions[18:]) and len(captions) == 30
        assert not any(text.startswith("no") for text in captions[:18])
    assert len({tuple(sorted(captions[18:])) for captions in every}) > 3
    halves = [drawn(1, rank=rank, ranks=2) for rank in (0, 1)]
    assert [x for half in halves for x in half[:9]] == every[0][:18]
    assert [x for half in halves for x in half[9:]] == every[0][18:]


@pytest.mark.parametrize("change", [
    {"micro_batch_size": 5}, {"freeze": "text"}, {"freeze": "audio"}, {"diagnose_every": 1},
    {"queue": 30}, {"loss": "siglip"}, {"mix": 0.5, "caption_dropout": 0.2}, {"workers": 1},
])  # fmt: skip
def test_with_everything_else(wrong, manifest, tmp_path, change):
    options = {"batch_size": 6, "epochs": 2, **change}
    run = train(settings(wrong, tmp_path / "run", val=wrong, **options))
    assert len(log_of(run)) == 6
    plain = train(settings(wrong, tmp_path / "again", val=wrong, **options))
    assert [x["loss"] for x in log_of(run)] == [x["loss"] for x in log_of(plain)]
    rows = [json.loads(line) for line in wrong.read_text().splitlines()]
    right = wrong.with_name("right.jsonl")
    right.write_text(
        "\n".join(json.dumps({k: row[k] for k in ("audio", "captions")}) for row in rows)
    )
    without = train(settings(right, tmp_path / "without", val=wrong, **options))
    assert log_of(run)[0]["loss"] > log_of(without)[0]["loss"]
    if change in ({"micro_batch_size": 5}, {"diagnose_every": 1}, {"workers": 1}):
        same = train(settings(wrong, tmp_path / "same", batch_size=6, epochs=2))
        losses = [[line["loss"] for line in log_of(folder)] for folder in (run, same)]
        assert near(*losses, within=1e-5)


def test_other_wrong_captions_are_another_corpus(wrong, manifest, tmp_path):
    run = train(settings(wrong, tmp_path / "run", epochs=1, batch_size=6))
    before = wrong.read_text()
    wrong.write_text(before.replace("no dog", "no cat"))
    try:
        with pytest.raises(UserError, match="have changed since"):
            train(settings(wrong, run, epochs=2, batch_size=6), resume=True)
    finally:
        wrong.write_text(before)


def test_wrong_and_past_together():
    queue = Queue(4)
    assert step.further(None, None, None) is step.further(None, None, queue) is None
    rows, ids = torch.ones(2, 3), torch.tensor([-1, 5])
    assert step.further(rows, ids, queue) == (None, rows, None, ids)
    queue.push(torch.zeros(3, 3), -rows[:1].expand(3, 3), torch.tensor([4, 5, 6]))
    both = step.further(rows, ids, queue)
    assert both.text.tolist() == [[-1] * 3] * 3 + [[1] * 3] * 2
    assert both.text_ids.tolist() == [4, 5, 6, -1, 5]
    assert both.audio.tolist() == [[0] * 3] * 3 and both.audio_ids.tolist() == [4, 5, 6]
    assert SMALL.width == 32
