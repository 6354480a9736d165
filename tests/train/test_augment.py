"""Augmentation: gain, mixing, SpecAugment, words left out; seeded as every draw is."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from clips import SMALL, WORDS, Stop, log_of, near, settings, stopped_at, write_clips
from supclap.augment import Augmentation, masked, mixed, some_words
from supclap.batches import Epoch
from supclap.cli import main
from supclap.config import RECIPES, TrainConfig, build_config
from supclap.corpus import join, load_corpus
from supclap.errors import UserError
from supclap.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = {"gain": 6.0, "mix": 0.5, "spec_augment": 2, "caption_dropout": 0.3}


def rng(seed=0):
    return np.random.default_rng(seed)


def rms(wave):
    return math.sqrt(np.square(wave, dtype=np.float64).mean())


# ------------------------------------------------------------------------------------ each by hand


def test_mixed_is_the_sum_at_a_level():
    one, other = rng(1).standard_normal(500), 0.1 * rng(2).standard_normal(300)
    one, other = one.astype(np.float32), other.astype(np.float32)
    for level in (-5.0, 0.0, 5.0):
        both = mixed(one, other, level)
        assert both.dtype == np.float32 and len(both) == 500
        assert np.array_equal(both[300:], one[300:])
        added = both[:300] - one[:300]
        assert near(20 * math.log10(rms(added) / rms(one)), level, within=1e-3)
        assert near(np.corrcoef(added, other)[0, 1], 1.0, within=1e-5)
    assert len(mixed(other, one, 0.0)) == 500
    noise = mixed(one, 1e-4 * other, 0.0)[:300] - one[:300]
    assert near(20 * math.log10(rms(noise) / rms(1e-4 * other)), 30.0, within=0.1)


@pytest.mark.parametrize("silent", ["one", "other", "both"])
def test_mixed_with_silence(silent):
    wave, nothing = np.ones(8, dtype=np.float32), np.zeros(8, dtype=np.float32)
    one = nothing if silent != "other" else wave
    other = nothing if silent != "one" else wave
    assert np.array_equal(mixed(one, other, 3.0), np.maximum(one, other))


def test_masked_spans_get_the_mean():
    features = torch.randn(80, 64).half()
    before = features.clone()
    hidden = np.zeros((80, 64))
    for seed in range(200):
        made = masked(features, rng(seed), 2)
        assert made.dtype == torch.float16 and made.shape == (80, 64)
        other = (made != before).numpy()
        assert other[:, ~other.all(axis=0)].all(axis=1).sum() <= 2 * 10  # an eighth of the frames
        assert other[~other.all(axis=1)].all(axis=0).sum() <= 2 * 8
        assert (made[torch.from_numpy(other)] == before.float().mean().half()).all()
        hidden += other
        in_time = other[:, ~other.all(axis=0)].all(axis=1)
        assert not in_time[-1]  # an encoder may repeat it
    assert torch.equal(features, before)  # kept features are shared
    assert 0.1 < hidden.mean() / 200 < 0.3 and (hidden > 0).all()


def test_masked_of_a_wave_and_of_the_shortest():
    wave = torch.randn(1600, 1)
    assert (masked(wave, rng(), 4) != wave).any()
    for shape in ((1, 64), (1, 1), (7, 3)):
        assert masked(torch.randn(shape), rng(), 3).shape == shape


def test_some_words():
    caption = " ".join(map(str, range(40)))
    left = [some_words(caption, rng(seed), 0.25).split() for seed in range(200)]
    assert near(np.mean([len(words) for words in left]), 30.0, within=0.6)
    for words in left:
        assert words == sorted(words, key=int)
    assert {some_words("one two", rng(seed), 0.99) for seed in range(50)} == {"one", "two"}
    for caption in ("rain", "下雨的声音"):  # no words to choose from
        assert some_words(caption, rng(), 0.99) == caption


# ---------------------------------------------------------------------------------------- in epochs


def text_of(captions, languages):
    return (torch.tensor([list(f"{c:<200}".encode()[:200]) for c in captions]),)


def captions_of(batch):
    return [bytes(row.tolist()).decode().strip() for row in batch.text[0]]


def epoch_of(corpus, number=1, size=6, **settings):
    return Epoch(corpus, text_of, size, 3, number, augmentation=Augmentation(**settings))


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """Nine clips, with a caption in English and one in French; two rows of one file."""
    folder = tmp_path_factory.mktemp("languages")
    write_clips(folder)
    rows = [{"audio": f"{w}.wav", "caption": f"a {w}.", "caption_fr": f"un {w}."} for w in WORDS]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_corpus(folder / "m.jsonl", 30.0, cache="off")


def test_a_mixed_pair_has_both_captions_and_both_sounds(languages):
    seen = 0
    for number in range(1, 9):
        plain, epoch = epoch_of(languages, number), epoch_of(languages, number, mix=1.0)
        for n in range(len(epoch.parts)):
            batch, before = epoch.batch(n), plain.batch(n)
            inside = {text.split()[1].rstrip(".") for text in captions_of(before)}
            texts = zip(captions_of(batch), captions_of(before), strict=True)
            for row, (text, alone) in enumerate(texts):
                if text == alone:
                    continue
                seen += 1
                first, other = text.split(", ")
                assert f"{first}." == alone and other.split()[0] == alone.split()[0]  # a, un
                assert other.split()[1].rstrip(".") not in inside  # it would be a false negative
                heard, alone = batch.audio[0][row], before.audio[0][row]
                assert batch.audio[1][row] >= before.audio[1][row]
                assert not torch.equal(heard[: len(alone)], alone[: len(heard)])
            assert torch.equal(batch.ids, before.ids)
    assert seen > 60


def test_the_share_that_is_mixed(languages):
    count = 0
    for number in range(1, 31):
        epoch = epoch_of(languages, number, mix=0.3, size=3)
        count += sum(", " in text for n in range(6) for text in captions_of(epoch.batch(n)))
    assert near(count / (30 * 18), 0.3, within=0.06)


def test_no_partner_is_left_in_a_batch_of_all(languages):
    epoch = epoch_of(languages, size=18, mix=1.0)
    assert not any(", " in text for text in captions_of(epoch.batch(0)))


def test_partners_come_as_often_as_pairs(manifest, languages, tmp_path):
    """By the manifests' weights; and a language that is rare is mixed as often."""
    rows = [{"audio": str(manifest.with_name(f"{w}.wav")), "caption": f"{w} again"} for w in WORDS]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = load_corpus(tmp_path / "m.jsonl", 30.0, cache="off")
    corpus = join([languages, more], (0.5, 4.0))
    partners, mixed_of = Counter(), Counter()
    for number in range(1, 30):
        epoch = epoch_of(corpus, number, mix=1.0, size=3)
        for part in epoch.parts:
            near_by = epoch.near(part % epoch.count)
            for n in part.tolist():
                example = epoch.example(n, near_by)
                french = corpus.languages[example.pair] == "fra"
                mixed_of[french, example.other is not None] += 1
                if example.other is not None and not french:
                    partners[example.other >= 18] += 1
    assert partners[True] > 3 * partners[False]  # 36 of 41 are of the second
    share = mixed_of[True, True] / (mixed_of[True, True] + mixed_of[True, False])
    assert share > 0.8


def test_a_sentence_of_the_batch_is_no_partner(manifest, tmp_path):
    rows = [{"audio": f"{w}.wav", "caption": f"class {n % 3}"} for n, w in enumerate(WORDS)]
    table = manifest.with_name("classes.jsonl")
    table.write_text("\n".join(map(json.dumps, rows)))
    corpus = load_corpus(table, 30.0, cache="off")
    seen = 0
    for number in range(1, 20):
        epoch = epoch_of(corpus, number, mix=1.0, size=2)
        for n in range(len(epoch.parts)):
            plain = captions_of(epoch_of(corpus, number, size=2).batch(n))
            for text in captions_of(epoch.batch(n)):
                if ", " in text:
                    seen += 1
                    assert text.split(", ")[1] not in plain
    assert seen > 50


def test_a_broken_file_is_found_before_training(manifest, tmp_path):
    """Though nothing is kept of the files."""
    wave = np.full(8_000, np.nan, dtype=np.float32)
    soundfile.write(manifest.with_name("nan.wav"), wave, 16_000, subtype="FLOAT")
    table = manifest.with_name("nan.csv")
    table.write_text(f"{manifest.read_text()}\nnan.wav,nothing,nothing at all")
    with pytest.raises(UserError, match="1 of 10 audio files"):
        train(settings(table, tmp_path / "run", gain=3.0, epochs=1))


def test_gain_is_in_decibels(languages):
    plain, louder = epoch_of(languages), epoch_of(languages, gain=6.0)
    changes = []
    for n in range(len(plain.parts)):
        (before, lengths), (after, _) = plain.batch(n).audio, louder.batch(n).audio
        for row, length in enumerate(lengths):
            change = (after - before)[row, :length]
            middle = float(change.median())  # float16, and silence stays at its floor
            assert near((change - middle).abs().median(), 0.0, within=0.1)
            changes.append(middle)
    assert max(map(abs, changes)) <= 6.1 and len({round(c, 2) for c in changes}) == 18
    assert min(changes) < -2 and max(changes) > 2


def test_every_draw_has_its_seed(languages):
    def batches(**options):
        epoch = epoch_of(languages, **ALL)
        return list(epoch.batches(**options))

    first = batches()
    for again in (batches(), batches(workers=2)):
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a.audio[0], b.audio[0]) and torch.equal(a.text[0], b.text[0])
    assert torch.equal(batches(start=2)[0].audio[0], first[2].audio[0])
    other = epoch_of(languages, 2, **ALL).batch(0)
    assert captions_of(other) != captions_of(first[0])
    for rank in (0, 1):
        epoch = Epoch(languages, text_of, 6, 3, 1, rank, 2, augmentation=Augmentation(**ALL))
        rows = slice(3 * rank, 3 * rank + 3)
        assert captions_of(epoch.batch(0)) == captions_of(first[0])[rows]


# ----------------------------------------------------------------------------------------- in a run


def test_off_by_default(manifest, tmp_path):
    config = build_config({"data": manifest, "out": tmp_path}, recipe="paper")
    for each in (config, TrainConfig(data=manifest, out=tmp_path)):
        assert not any(getattr(each, name) for name in ALL)
    assert not RECIPES["paper"].keys() & ALL.keys()


def test_it_trains_and_resumes_bit_for_bit(manifest, tmp_path, monkeypatch):
    options = {**ALL, "batch_size": 6, "epochs": 3}
    whole = train(settings(manifest, tmp_path / "whole", **options))
    plain = train(settings(manifest, tmp_path / "plain", batch_size=6, epochs=3))
    assert log_of(whole)[0]["loss"] != log_of(plain)[0]["loss"]
    with monkeypatch.context() as patch:
        stopped_at(patch, 4)
        with pytest.raises(Stop):
            train(settings(manifest, tmp_path / "part", **options))
    train(settings(manifest, tmp_path / "part", **options), resume=True)
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("whole", "part")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ALL)
def test_each_changes_training_and_not_validation(manifest, tmp_path, name):
    options = {"batch_size": 18, "epochs": 1, "lr": 1e-30, "val": manifest, name: ALL[name]}
    options |= {"batch_size": 6} if name == "mix" else {}
    run = train(settings(manifest, tmp_path / "run", **options))
    plain = train(settings(manifest, tmp_path / "plain", **options | {name: 0}))
    assert log_of(run)[0]["loss"] != log_of(plain)[0]["loss"]
    assert log_of(run, "val") == log_of(plain, "val")


def test_what_is_altered_is_encoded_each_time(manifest, tmp_path):
    options = {"batch_size": 6, "epochs": 2, "freeze": "both"}
    for name, kept in (("gain", "text"), ("spec_augment", "text"), ("caption_dropout", "audio")):
        run = train(settings(manifest, tmp_path / name, **options, **{name: ALL[name]}))
        plain = train(settings(manifest, tmp_path / f"no-{name}", **options))
        assert log_of(run)[0]["loss"] != log_of(plain)[0]["loss"], kept


def test_captions_are_mixed_where_the_text_encoder_is_frozen(manifest, tmp_path, monkeypatch):
    options = {"batch_size": 6, "epochs": 1, "freeze": "text", "mix": 1.0}
    both = train(settings(manifest, tmp_path / "both", **options))
    monkeypatch.setattr("supclap.batches.both_captions", lambda caption, other: caption)
    one = train(settings(manifest, tmp_path / "one", **options))
    assert log_of(both)[0]["loss"] != log_of(one)[0]["loss"]


def test_features_that_change_are_not_kept(manifest, tmp_path):
    options = {"epochs": 1, "cache": str(tmp_path / "cache")}
    train(settings(manifest, tmp_path / "gain", **options, gain=3.0))
    assert not (tmp_path / "cache").exists()
    train(settings(manifest, tmp_path / "spec", **options, spec_augment=2))
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "error"),
    [(["--mix", "1.5"], "--mix must be in"), (["--gain", "-1"], "--gain must not be negative"),
     (["--spec-augment", "-1"], "--spec-augment"), (["--caption-dropout", "1"], "must be in")],
)  # fmt: skip
def test_what_cannot_be(manifest, tmp_path, flags, error, capsys):
    assert main(["train", "--data", str(manifest), "--out", str(tmp_path / "r"), *flags]) == 2
    assert error in capsys.readouterr().err
    with pytest.raises(UserError):
        settings(manifest, tmp_path, model=SMALL, mix=-0.1)
