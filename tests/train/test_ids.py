"""Which pairs of a batch are no negatives of each other."""

import json

import pytest
import torch
from clips import WORDS, log_of, near, settings, write_clips
from supclap.batches import Epoch, joined
from supclap.corpus import load_corpus
from supclap.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = "A dog  barks."


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Clips 0 and 4 share a sentence, up to its form; clip 4 shares another with clip 6."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    captions = {n: [f"the sound of a {word}", f"we hear a {word}"] for n, word in enumerate(WORDS)}
    captions[0][1], captions[4][0] = SHARED, "a dog barks"
    captions[4][1], captions[6][1] = "rain", "Rain"
    lines = [{"audio": f"{w}.wav", "captions": captions[n]} for n, w in enumerate(WORDS)]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "m.jsonl"


def test_joined_by_hand():
    a, b = torch.tensor([5, 5, 2, 3, 4, 9]), torch.tensor([0, 1, 1, 2, 2, 3])
    assert joined(a, b).tolist() == [0, 0, 0, 3, 3, 5]
    chain = torch.arange(50)
    assert joined(chain // 2, (chain + 1) // 2).tolist() == [0] * 50
    assert joined(chain).tolist() == chain.tolist()


def same(corpus, ids):
    """Which pairs of one batch of all are no negatives of each other, in the corpus' order."""
    epoch = Epoch(corpus, lambda texts, codes: (torch.zeros(len(texts)),), 18, ids=ids)
    found = epoch.batch(0).ids
    if found is None:
        return None
    found = found[epoch.parts[0].argsort()]
    return found[:, None] == found[None]


def test_pairs_of_a_clip_and_of_a_caption(manifest):
    corpus = load_corpus(manifest, 30.0)
    clip, sentence = corpus.clip_of, corpus.sentence_of
    of_clip = clip[:, None] == clip[None]
    assert same(corpus, "none") is None and torch.equal(same(corpus, "clip"), of_clip)
    of_caption = same(corpus, "caption")
    assert of_caption.sum() == 18 + 2 * 2 and of_caption[1, 8] and of_caption[9, 13]
    both = same(corpus, "both")
    group = (clip == 0) | (clip == 4) | (clip == 6)
    assert torch.equal(both, of_clip | (group[:, None] & group[None]))
    assert len(sentence.unique()) == 16


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree(manifest, ranks):
    """A pair on one rank may belong to one on another."""
    corpus = load_corpus(manifest, 30.0)
    arguments = (corpus, lambda texts, codes: (torch.zeros(len(texts)),), 11)
    for number in (0, 1):
        whole = Epoch(*arguments, ids="both").batch(number)
        parts = [
            Epoch(*arguments, rank=r, ranks=ranks, ids="both").batch(number) for r in range(ranks)
        ]
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        lengths = torch.cat([part.audio[1] for part in parts])
        assert torch.equal(lengths, whole.audio[1])


def test_fewer_negatives_lower_the_loss(manifest, tmp_path):
    first = {}
    for ids in ("none", "clip", "caption", "both"):
        run = train(settings(manifest, tmp_path / ids, ids=ids, batch_size=18, epochs=1))
        first[ids] = log_of(run)[0]["l_t2a"]
    assert first["none"] > first["clip"] > first["both"] and first["none"] > first["caption"]
    default = train(settings(manifest, tmp_path / "default", batch_size=18, epochs=1))
    assert near(log_of(default)[0]["l_t2a"], first["both"], within=0)
