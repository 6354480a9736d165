"""Retrieval metrics in both directions, the rule they follow, and their table.

Text and audio are compared by plain inner products; support vectors play no part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .corpus import Corpus, read_as_heard
from .embeddings import DEFAULTS, EmbedOptions, embed_corpus
from .manifest import read_manifest
from .model import SupclapModel, load_model, selection_note

RULE = (
    "t2a: every caption is a query over the unique clips; mAP@10 = mean of 1/rank if rank <= 10, "
    "else 0. a2t: one query per clip that has captions, over all captions; R@k and the median "
    "use the best rank of the clip's captions; AP@10 = sum over its hits in the top 10 of "
    "i/rank_i, divided by its number of captions. rank = 1 + number of others scoring >= it, so "
    "a tie counts against the model (captions of one clip that tie with each other rank in "
    "turn). median_rank = floor(median of the 0-based ranks) + 1. R@k and mAP@10 are fractions. "
    "Of several languages each is measured by itself, over all clips, and the numbers are means "
    "over languages."
)

COLUMNS = ("R@1", "R@5", "R@10", "mAP@10")
Metrics = dict[str, float]


def text_to_audio_ranks(text: Tensor, audio: Tensor, clip_of: Tensor, rows: int = 1024) -> Tensor:
    """Returns the rank of each caption's clip, [M]. text: [M, D], audio: [N, D], clip_of: [M]."""
    ranks = []
    for queries, clips in zip(text.split(rows), clip_of.split(rows), strict=True):
        scores = queries @ audio.T  # [rows, N]
        ranks.append((scores >= scores.gather(1, clips[:, None])).sum(dim=1))
    return torch.cat(ranks)


def audio_to_text_ranks(text: Tensor, audio: Tensor, clip_of: Tensor) -> list[Tensor]:
    """Returns for each of the N clips the ranks of its captions among all M, best first; none for a
    clip without captions."""
    order = clip_of.argsort(stable=True)
    captions = order.split(torch.bincount(clip_of, minlength=len(audio)).tolist())
    ranks = []
    unique, place = text.unique(dim=0, return_inverse=True)  # equal captions must tie
    for clip, captions_of_clip in enumerate(captions):
        scores = (unique @ audio[clip])[place]  # [M]
        hits = scores[captions_of_clip].sort(descending=True).values  # [captions of the clip]
        others = scores[clip_of != clip]
        above = (others >= hits[:, None]).sum(dim=1)
        ranks.append(above + torch.arange(1, len(hits) + 1))
    return ranks


def summarise(ranks: Tensor, average_precision: Tensor) -> Metrics:
    """Takes the best rank and the AP@10 of each of Q queries, each [Q]."""
    metrics = {f"R@{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    metrics["mAP@10"] = average_precision.double().mean().item()
    metrics["median_rank"] = float((ranks - 1).double().quantile(0.5).floor().item() + 1)
    return metrics


def retrieval_metrics(text: Tensor, audio: Tensor, clip_of: Tensor) -> dict[str, Metrics]:
    """Returns metrics by RULE, "t2a" and "a2t". text: [M, D], audio: [N, D], clip_of: [M] int64."""
    t2a = text_to_audio_ranks(text, audio, clip_of)
    reciprocal = torch.where(t2a <= 10, 1.0 / t2a.double(), 0.0)
    a2t = [ranks for ranks in audio_to_text_ranks(text, audio, clip_of) if len(ranks)]
    precision = [
        (torch.arange(1, len(r) + 1) / r.double() * (r <= 10)).sum() / len(r) for r in a2t
    ]  # AP@10 of each clip
    best = torch.stack([r[0] for r in a2t])
    return {"t2a": summarise(t2a, reciprocal), "a2t": summarise(best, torch.stack(precision))}


def chance(clip_of: Tensor, clips: int = 0) -> dict[str, Metrics]:
    """Returns R@k and mAP@10 of a random ranking. clip_of: [M], the clip of each caption; `clips`:
    how many there are, if some of the last have no caption."""
    counts = torch.bincount(clip_of, minlength=clips).double()  # captions of each of the N clips
    clips, captions = len(counts), len(clip_of)
    counts = counts[counts > 0]  # of the clips that are queries
    places = torch.arange(1, 11).double()
    t2a = {f"R@{k}": min(1.0, k / clips) for k in (1, 5, 10)}
    t2a["mAP@10"] = (1 / places[:clips]).sum().item() / clips
    a2t = {}
    for k in (1, 5, 10):  # all of the first k places taken by other clips' captions
        taken = torch.arange(min(k, captions))
        missed = ((captions - counts[:, None] - taken).clamp(min=0) / (captions - taken)).prod(
            dim=1
        )
        a2t[f"R@{k}"] = (1 - missed).mean().item()
    places = places[:captions]
    hits_before = (places - 1) * (counts[:, None] - 1) / max(1, captions - 1)
    a2t["mAP@10"] = ((1 + hits_before) / places).sum(dim=1).mean().item() / captions
    return {"t2a": t2a, "a2t": a2t}


def mean_recall(metrics: dict[str, Metrics]) -> float:
    """R@1, averaged over both directions: the "best" checkpoint has the highest."""
    return (metrics["t2a"]["R@1"] + metrics["a2t"]["R@1"]) / 2


def mean_metrics(several: list[dict[str, Metrics]]) -> dict[str, Metrics]:
    """Returns the mean of each number in "t2a" and "a2t"."""
    return {
        way: {name: sum(m[way][name] for m in several) / len(several) for name in several[0][way]}
        for way in ("t2a", "a2t")
    }


def rows_by_language(corpus: Corpus) -> dict[str, Tensor]:
    """Returns which captions are in each language: [M] bool."""
    codes = sorted(set(corpus.languages))
    return {code: torch.tensor([x == code for x in corpus.languages]) for code in codes}


def corpus_metrics(text: Tensor, audio: Tensor, corpus: Corpus) -> dict[str, Any]:
    """Returns metrics "t2a" and "a2t" of the unit vectors of a corpus; with several languages their
    means, and "languages": those of each."""
    by_language = {
        code: retrieval_metrics(text[rows], audio, corpus.clip_of[rows])
        for code, rows in rows_by_language(corpus).items()
    }
    several = list(by_language.values())
    return several[0] if len(several) == 1 else mean_metrics(several) | {"languages": by_language}


def chance_of(corpus: Corpus) -> dict[str, Metrics]:
    """Returns what a random ranking gets on a corpus, as `corpus_metrics` counts: the mean over
    languages."""
    spoken, clips = rows_by_language(corpus).values(), len(corpus.clips)
    return mean_metrics([chance(corpus.clip_of[rows], clips) for rows in spoken])


def evaluate_corpus(
    model: SupclapModel, corpus: Corpus, batch_size: int = 64, workers: int = 0
) -> dict[str, Any]:
    """Returns the metrics of a model on a corpus."""
    return corpus_metrics(*embed_corpus(model, corpus, batch_size, workers), corpus)


def evaluate_run(
    run: Path, data: Path, options: EmbedOptions = DEFAULTS
) -> tuple[dict[str, Any], Corpus]:
    """Returns metrics of a run's checkpoint on the manifest `data`, and the corpus measured. A
    checkpoint that was selected on a test set says so."""
    model = load_model(run).to(options.device)
    corpus = read_as_heard(model, read_manifest(data), data, options)
    metrics = evaluate_corpus(model, corpus, options.batch_size, options.workers)
    return metrics | selection_note(run), corpus


def table(rows: dict[str, dict[str, Metrics]], columns: tuple[str, ...] = COLUMNS) -> str:
    """Returns one line per row, both directions side by side, in percent."""
    width = max(map(len, rows)) + 2
    blank = " " * width
    blocks = [f"{name:^{9 * len(columns)}}" for name in ("text to audio", "audio to text")]
    lines = [blank + "  ".join(blocks).rstrip()]
    lines.append(blank + "  ".join("".join(f"{name:>9}" for name in columns) for _ in range(2)))
    for name, metrics in rows.items():
        percent = [[100 * metrics[way][c] for c in columns] for way in ("t2a", "a2t")]
        cells = ("".join(f"{p:9.2f}" for p in block) for block in percent)
        lines.append(f"{name:<{width}}" + "  ".join(cells))
    return "\n".join(lines)
