"""Retrieval metrics against tables worked out by hand, and against plain loops."""

import itertools

import torch
from clips import near
from supclap.evaluate import (
    audio_to_text_ranks,
    chance,
    retrieval_metrics,
    text_to_audio_ranks,
)


def from_scores(scores):
    """Embeddings whose inner products are the given [captions, clips] table."""
    text = torch.tensor(scores, dtype=torch.float32)
    return text, torch.eye(text.shape[1])


def test_by_hand_with_two_captions_each():
    # Captions 0, 1 belong to clip 0; 2, 3 to clip 1; 4, 5 to clip 2.
    scores = [
        [0.9, 0.1, 0.2],  # rank 1
        [0.3, 0.5, 0.4],  # rank 3
        [0.6, 0.7, 0.1],  # rank 1
        [0.8, 0.2, 0.3],  # rank 3
        [0.5, 0.6, 0.55],  # rank 2
        [0.1, 0.3, 0.95],  # rank 1
    ]
    clip_of = torch.tensor([0, 0, 1, 1, 2, 2])
    text, audio = from_scores(scores)
    assert text_to_audio_ranks(text, audio, clip_of).tolist() == [1, 3, 1, 3, 2, 1]
    # Clip 0: .9 .8 .6 .5 .3 .1 -> own at 1, 5. Clip 1: .7 .6 .5 .3 .2 .1 -> own at 1, 5.
    # Clip 2: .95 .55 .4 .3 .2 .1 -> own at 1, 2.
    ranks = [r.tolist() for r in audio_to_text_ranks(text, audio, clip_of)]
    assert ranks == [[1, 5], [1, 5], [1, 2]]

    metrics = retrieval_metrics(text, audio, clip_of)
    t2a, a2t = metrics["t2a"], metrics["a2t"]
    assert near(t2a["R@1"], 3 / 6)
    assert t2a["R@5"] == 1 and t2a["R@10"] == 1
    assert near(t2a["mAP@10"], (1 + 1 / 3 + 1 + 1 / 3 + 1 / 2 + 1) / 6)
    assert t2a["median_rank"] == 1  # 1 1 1 2 3 3: floor(0.5) + 1
    assert a2t["R@1"] == 1
    assert near(a2t["mAP@10"], ((1 + 2 / 5) / 2 * 2 + 1) / 3)
    assert a2t["median_rank"] == 1


def test_a_miss_beyond_ten_counts_zero_but_stays_in_the_divisor():
    clips = 24
    scores = torch.full((clips + 1, clips), 0.5)
    scores[torch.arange(clips), torch.arange(clips)] = 0.9
    scores[clips, 0] = 0.1  # second caption of clip 0, behind every other one
    clip_of = torch.tensor([*range(clips), 0])
    metrics = retrieval_metrics(scores, torch.eye(clips), clip_of)
    assert near(metrics["a2t"]["mAP@10"], (clips - 1 + 0.5) / clips)
    assert near(metrics["t2a"]["mAP@10"], clips / (clips + 1))
    assert near(metrics["t2a"]["R@10"], clips / (clips + 1))
    assert metrics["a2t"]["R@1"] == 1


def test_ties_count_against_the_model():
    clips, each = 12, 5
    clip_of = torch.arange(clips).repeat_interleave(each)
    metrics = retrieval_metrics(
        torch.ones(clips * each, 3), torch.ones(clips, 3), clip_of
    )  # a collapsed model
    for way in ("t2a", "a2t"):
        assert metrics[way]["R@1"] == metrics[way]["R@10"] == metrics[way]["mAP@10"] == 0
    assert metrics["t2a"]["median_rank"] == clips
    assert metrics["a2t"]["median_rank"] == (clips - 1) * each + 1


def test_equal_captions_of_one_clip_do_not_hurt_it():
    clip_of = torch.tensor([0, 0, 0, 1, 1, 1])
    text = torch.eye(2)[clip_of]  # every caption of a clip is the same sentence
    metrics = retrieval_metrics(text, torch.eye(2), clip_of)
    assert metrics["a2t"] == {"R@1": 1, "R@5": 1, "R@10": 1, "mAP@10": 1, "median_rank": 1}
    assert metrics["t2a"]["R@1"] == 1


def test_against_loops_with_uneven_captions_in_any_order():
    generator = torch.Generator().manual_seed(3)
    clip_of = torch.tensor([3, 0, 1, 1, 2, 4, 0, 3, 3, 5, 6, 1, 7, 8, 8, 9, 10, 11, 2, 11])
    text = torch.randn(len(clip_of), 4, generator=generator).round(decimals=0)  # many ties
    audio = torch.randn(12, 4, generator=generator).round(decimals=0)
    scores = (text @ audio.T).tolist()
    ranks = []
    for caption, clip in enumerate(clip_of.tolist()):
        row = scores[caption]
        ranks.append(1 + sum(row[c] >= row[clip] for c in range(12) if c != clip))
    precision, best = [], []
    for clip in range(12):
        captions = [c for c in range(len(scores)) if clip_of[c] == clip]
        hits = sorted((scores[c][clip] for c in captions), reverse=True)
        other = [scores[c][clip] for c in range(len(scores)) if clip_of[c] != clip]
        places = [i + 1 + sum(s >= hit for s in other) for i, hit in enumerate(hits)]
        best.append(places[0])
        precision.append(sum((i + 1) / p for i, p in enumerate(places) if p <= 10) / len(captions))
    metrics = retrieval_metrics(text, audio, clip_of)
    assert text_to_audio_ranks(text, audio, clip_of, rows=7).tolist() == ranks
    assert near(metrics["t2a"]["R@5"], sum(r <= 5 for r in ranks) / len(ranks))
    assert near(metrics["a2t"]["R@5"], sum(r <= 5 for r in best) / 12)
    assert near(metrics["a2t"]["mAP@10"], sum(precision) / 12)
    assert near(metrics["t2a"]["mAP@10"], sum(1 / r for r in ranks if r <= 10) / len(ranks))


def test_chance_is_the_mean_over_all_rankings():
    clip_of = torch.tensor([0, 0, 1])
    sums = torch.zeros(2)
    orders = list(itertools.permutations(range(3)))
    for order in orders:  # order[c]: place of caption c for either clip
        places = torch.tensor(order) + 1
        for captions in ([0, 1], [2]):
            ranks = places[captions].sort().values
            sums += torch.stack(
                [
                    (ranks[0] == 1).float(),
                    (torch.arange(1, len(captions) + 1) / ranks).sum() / len(captions),
                ]
            )
    expected = (sums / (2 * len(orders))).tolist()
    numbers = chance(clip_of)["a2t"]
    assert near([numbers["R@1"], numbers["mAP@10"]], expected)
    assert numbers["R@5"] == 1
    t2a = chance(torch.arange(40).repeat_interleave(5))["t2a"]
    assert near(t2a["R@10"], 0.25)
    assert near(t2a["mAP@10"], sum(1 / r for r in range(1, 11)) / 40)
