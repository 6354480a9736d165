"""Training on several manifests, each with its weight."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import WORDS, log_of, settings
from supclap.batches import Epoch
from supclap.checkpoint import difference
from supclap.cli import main
from supclap.config import TrainConfig, build_config, read_config
from supclap.corpus import join, load_corpus
from supclap.errors import UserError
from supclap.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def second(manifest, tmp_path_factory):
    """Two clips of the first manifest and one of its own, with a caption each."""
    folder = tmp_path_factory.mktemp("second")
    shutil.copy(manifest.with_name("dog.wav"), folder / "other.wav")
    rows = [["other.wav", "another"]]
    rows += [[str(manifest.with_name(f"{word}.wav")), f"a {word} again"] for word in WORDS[1:3]]
    lines = [json.dumps({"audio": name, "captions": [text]}) for name, text in rows]
    (folder / "m.jsonl").write_text("\n".join(lines))
    return folder / "m.jsonl"


def tokenizer(captions, languages):
    return (torch.tensor([[len(caption)] for caption in captions]),)


def epoch_of(corpus, number=1, size=4, **options):
    return Epoch(corpus, tokenizer, size, seed=3, epoch=number, **options)


def pairs_of(epoch):
    """The pairs of an epoch, in their order."""
    return (torch.cat(list(epoch.parts)) % len(epoch.corpus.captions)).tolist()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0), (0.5, 3.0), (1.25, 0.34)])
def test_an_epoch_takes_each_manifest_by_its_weight(manifest, second, weights):
    corpus = join([load_corpus(manifest, 30.0), load_corpus(second, 30.0)], weights)
    assert len(corpus.clips) == 12 and len(corpus.captions) == 21
    seen = []
    for number in (1, 2):
        counts = Counter(pairs_of(epoch_of(corpus, number, size=1)))
        of_first = [counts[pair] for pair in range(18)]
        of_second = [counts[pair] for pair in range(18, 21)]
        assert sum(of_first) == round(18 * weights[0]) and sum(of_second) == round(3 * weights[1])
        for found, weight in ((of_first, weights[0]), (of_second, weights[1])):
            assert {*found} <= {int(weight), int(np.ceil(weight))}
        assert sum(counts.values()) == corpus.taken
        seen.append(of_first)
    assert (seen[0] == seen[1]) is weights[0].is_integer()  # another part in each epoch


def test_one_manifest_is_as_ever(manifest):
    corpus = load_corpus(manifest, 30.0)
    expected = np.random.default_rng([3, 1]).permutation(18).tolist()
    assert pairs_of(epoch_of(corpus)) == expected
    assert join([corpus], ()) is corpus and corpus.taken == 18
    both = join([corpus, corpus], ())
    expected = np.random.default_rng([3, 1]).permutation(36).tolist()
    assert pairs_of(epoch_of(both)) == expected and both.taken == 36  # however many manifests
    expected = np.random.default_rng([3, 1]).permutation(18).tolist()
    assert pairs_of(epoch_of(join([corpus], (1.0,)))) != expected  # drawn by weight
    assert sorted(pairs_of(epoch_of(join([corpus], (1.0,))))) == list(range(18))


def test_a_weight_too_small_for_a_pair_takes_one(second):
    corpus = join([load_corpus(second, 30.0)] * 2, (0.01, 1.0))
    assert corpus.taken == 4 and len(pairs_of(epoch_of(corpus, size=4))) == 4


def test_a_file_of_both_is_one_clip(manifest, second):
    """Whatever name a manifest has for it, it is no negative of itself."""
    first, other = load_corpus(manifest, 30.0), load_corpus(second, 30.0)
    corpus = join([first, other], (1.0, 1.0))
    labels = corpus.file_of.tolist()
    assert labels[19] == labels[2] == labels[3] and labels[20] == labels[4]  # rain, door
    assert labels[18] not in labels[:18]  # a copy is another file
    epoch = epoch_of(corpus, size=21, ids="clip")
    found, pairs = epoch.batch(0).ids, pairs_of(epoch)
    assert found[pairs.index(19)] == found[pairs.index(2)] == found[pairs.index(3)]
    assert torch.equal(first.file_of, first.clip_of)


def test_copies_of_a_pair_are_cut_differently(second):
    corpus = join([load_corpus(second, 0.2, cache="off")], (3.0,))
    assert corpus.longer.all()
    epoch, seen = epoch_of(corpus, size=9), {}
    audio, lengths = epoch.batch(0).audio
    for row, pair in enumerate(pairs_of(epoch)):
        seen.setdefault(pair, []).append(audio[row, : lengths[row]])
    assert [len(parts) for _, parts in sorted(seen.items())] == [3, 3, 3]
    for one, two, three in seen.values():
        assert not torch.equal(one, two) and not torch.equal(two, three)


def test_ranks_share_what_is_drawn(manifest, second):
    corpus = join([load_corpus(manifest, 30.0), load_corpus(second, 30.0)], (0.5, 2.0))
    whole = epoch_of(corpus, size=6)
    parts = [epoch_of(corpus, size=6, rank=rank, ranks=2) for rank in (0, 1)]
    for number in range(len(whole.parts)):
        texts = [part.batch(number).text[0] for part in parts]
        assert torch.equal(torch.cat(texts), whole.batch(number).text[0])


def test_trained_and_resumed(manifest, second, tmp_path, capsys):
    data, rest = (
        [str(manifest), str(second)],
        ["--batch-size", "5", "--width", "32", "--heads", "2"],
    )
    flags = ["--data", *data, "--data-weights", "0.5", "2", *rest]
    assert main(["train", *flags, "--epochs", "4", "--out", str(tmp_path / "whole")]) == 0
    assert "12 clips, 21 pairs, 15 of them in an epoch, 12 steps" in capsys.readouterr().out
    kept = read_config(tmp_path / "whole")
    assert kept.data == (manifest, second) and kept.data_weights == (0.5, 2.0)
    flags += ["--schedule", "constant", "--warmup", "0"]
    assert main(["train", *flags, "--epochs", "4", "--out", str(tmp_path / "one")]) == 0
    assert main(["train", *flags, "--epochs", "2", "--out", str(tmp_path / "two")]) == 0
    moved = ["--data", *map(str, (manifest, second)), "--epochs", "4"]
    assert main(["train", "--resume", str(tmp_path / "two"), *moved]) == 0
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    assert main(["train", "--resume", str(tmp_path / "two"), *moved, "--data", data[0]]) == 2
    assert "--data-weights" in capsys.readouterr().err


def test_bad_files_are_left_out_of_each(manifest, second, tmp_path):
    (second.parent / "broken.wav").write_text("no sound")
    table = second.with_name("broken.jsonl")
    line = json.dumps({"audio": "broken.wav", "captions": ["nothing"]})
    table.write_text(f"{second.read_text()}\n{line}")
    options = {"data_weights": (1.0, 2.0), "epochs": 1, "skip_bad_audio": True}
    run = train(settings((manifest, table), tmp_path / "run", **options, batch_size=24))
    assert len(log_of(run)) == 1 and (log_of(run, "speed")[0]["pairs_per_second"]) > 0


@pytest.mark.parametrize(
    ("weights", "error"),
    [((1.0,), "--data-weights: 2 manifests and 1 weights"), ((1.0, 0.0), "positive"),
     ((1.0, float("inf")), "positive"), ((-1.0, 2.0), "positive")],
)  # fmt: skip
def test_weights_that_cannot_be(manifest, tmp_path, weights, error):
    with pytest.raises(UserError, match=error):
        settings((manifest, manifest), tmp_path, data_weights=weights)


def test_one_path_or_many():
    assert TrainConfig(data="a.csv", data_weights=0.5, out="run").data_weights == (0.5,)
    for data in ("a.csv", ["a.csv"], ("a.csv",)):
        assert TrainConfig(data=data, out="run").data == Path("a.csv")
    with pytest.raises(UserError, match="--data"):
        TrainConfig(data=(), out="run")


def test_flags_may_be_repeated(manifest, second, tmp_path, capsys):
    flags = ["--data", str(manifest), "--data", str(second), "--width", "32", "--heads", "2"]
    assert main(["train", *flags, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert "12 clips, 21 pairs, 1 steps" in capsys.readouterr().out


def test_one_clip_by_two_manifests_has_no_negative(manifest, tmp_path, capsys):
    table = manifest.with_name("one.csv")
    table.write_text("file_name,caption\ndog.wav,a dog")
    train(settings((table, table), tmp_path / "run", epochs=1))
    assert "no pair of a batch has a negative" in capsys.readouterr().out


def test_files_of_one_name_are_told_apart():
    before = [["a.wav", 1], ["b.wav", 2], ["a.wav", 3]]

    class Now:
        hashes = [["a.wav", 1], ["b.wav", 2], ["a.wav", 4]]

    assert difference(before, Now()) == "1 with other captions (a.wav (2))"
    Now.hashes = [["a.wav", 9], ["b.wav", 2], ["a.wav", 3]]
    assert difference(before, Now()) == "1 with other captions (a.wav)"


def test_in_a_file(tmp_path):
    table = tmp_path / "run.toml"
    table.write_text('data = ["a.csv", "b.csv"]\ndata-weights = [2, 0.5]\nout = "run"\n')
    config = build_config({}, table)
    assert [path.name for path in config.data] == ["a.csv", "b.csv"]
    assert config.data_weights == (2.0, 0.5)
    table.write_text('data = "a.csv"\nout = "run"\n')
    assert build_config({}, table).manifests == (Path("a.csv"),)
    for wrong in (
        "data = [1]\n",
        'data = ["a"]\ndata-weights = ["x"]\n',
        'data = "a"\nlr = [1.0]\n',
    ):
        table.write_text(f'{wrong}out = "run"\n')
        with pytest.raises(UserError, match="must be"):
            build_config({}, table)
