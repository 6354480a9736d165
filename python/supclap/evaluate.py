"""Retrieval metrics in both directions, and the rule they follow.

Text and audio are compared by plain inner products; support vectors play no part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .data import Corpus, load_clips, loaded, pad_features
from .manifest import Clip, read_manifest
from .model import SupclapModel, chosen_on_test, evaluating, load_model

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

Metrics = dict[str, float]


def text_to_audio_ranks(text: Tensor, audio: Tensor, clip_of: Tensor, rows: int = 1024) -> Tensor:
    """text: [M, D], audio: [N, D], clip_of: [M] -> [M] rank of each caption's clip."""
    ranks = []
    for queries, clips in zip(text.split(rows), clip_of.split(rows), strict=True):
        scores = queries @ audio.T  # [rows, N]
        ranks.append((scores >= scores.gather(1, clips[:, None])).sum(dim=1))
    return torch.cat(ranks)


def audio_to_text_ranks(text: Tensor, audio: Tensor, clip_of: Tensor) -> list[Tensor]:
    """For each of the N clips the ranks of its own captions among all M, best first; of a clip
    without captions none."""
    order = clip_of.argsort(stable=True)
    captions = order.split(torch.bincount(clip_of, minlength=len(audio)).tolist())
    ranks = []
    unique, place = text.unique(dim=0, return_inverse=True)  # equal captions must tie
    for clip, own in enumerate(captions):
        scores = (unique @ audio[clip])[place]  # [M]
        hits = scores[own].sort(descending=True).values  # [captions of the clip]
        others = scores[clip_of != clip]
        above = (others >= hits[:, None]).sum(dim=1)
        ranks.append(above + torch.arange(1, len(own) + 1))
    return ranks


def summarise(ranks: Tensor, average_precision: Tensor) -> Metrics:
    """ranks: [Q] best rank of each query; average_precision: [Q] AP@10 of each query."""
    metrics = {f"R@{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    metrics["mAP@10"] = average_precision.double().mean().item()
    metrics["median_rank"] = float((ranks - 1).double().quantile(0.5).floor().item() + 1)
    return metrics


def retrieval_metrics(text: Tensor, audio: Tensor, clip_of: Tensor) -> dict[str, Metrics]:
    """text: [M, D], audio: [N, D], clip_of: [M] int64 -> metrics by RULE for "t2a" and "a2t"."""
    t2a = text_to_audio_ranks(text, audio, clip_of)
    reciprocal = torch.where(t2a <= 10, 1.0 / t2a.double(), 0.0)
    a2t = [ranks for ranks in audio_to_text_ranks(text, audio, clip_of) if len(ranks)]
    precision = [
        (torch.arange(1, len(r) + 1) / r.double() * (r <= 10)).sum() / len(r) for r in a2t
    ]  # AP@10 of each clip
    best = torch.stack([r[0] for r in a2t])
    return {"t2a": summarise(t2a, reciprocal), "a2t": summarise(best, torch.stack(precision))}


def chance(clip_of: Tensor) -> dict[str, Metrics]:
    """Expected R@k and mAP@10 of a random ranking; clip_of: [M], the clip of each caption."""
    own = torch.bincount(clip_of).double()  # captions of each of the N clips
    clips, captions = len(own), int(own.sum())
    places = torch.arange(1, 11).double()
    t2a = {f"R@{k}": min(1.0, k / clips) for k in (1, 5, 10)}
    t2a["mAP@10"] = (1 / places[:clips]).sum().item() / clips
    a2t = {}
    for k in (1, 5, 10):  # all of the first k places taken by other clips' captions
        taken = torch.arange(min(k, captions))
        missed = ((captions - own[:, None] - taken).clamp(min=0) / (captions - taken)).prod(dim=1)
        a2t[f"R@{k}"] = (1 - missed).mean().item()
    places = places[:captions]
    hits_before = (places - 1) * (own[:, None] - 1) / max(1, captions - 1)
    a2t["mAP@10"] = ((1 + hits_before) / places).sum(dim=1).mean().item() / captions
    return {"t2a": t2a, "a2t": a2t}


class Features(Dataset[tuple[Tensor, ...]]):
    """Features of a corpus, some clips at a time, padded, and their lengths."""

    def __init__(self, corpus: Corpus, rows: int) -> None:
        self.corpus, self.rows = corpus, rows

    def __len__(self) -> int:
        return -(-len(self.corpus.clips) // self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        clips = range(len(self.corpus.clips))[number * self.rows :][: self.rows]
        return pad_features([self.corpus.features(clip) for clip in clips])


def embed_audio(
    model: SupclapModel, corpus: Corpus, rows: int = 64, workers: int = 0
) -> Iterator[Tensor]:
    """Unit vectors of some clips at a time, on the CPU: [at most rows, D]."""
    device = model.log_scale.device
    workers = 0 if corpus.kept is not None else workers
    for batch in loaded(Features(corpus, rows), workers=workers):
        with evaluating(model):
            found = model.audio(*(x.to(device) for x in batch)).cpu()
        yield found


def embed_text(
    model: SupclapModel, captions: list[str], languages: list[str], rows: int = 64
) -> Tensor:
    """Unit vectors of captions, on the CPU: [M, D]. Equal captions are encoded once: beside others
    they would be padded to another length and rounded otherwise, and no longer tie."""
    device, found = model.log_scale.device, []
    pairs = list(dict.fromkeys(zip(captions, languages, strict=True)))
    for start in range(0, len(pairs), rows):
        said, of = zip(*pairs[start : start + rows], strict=True)
        with evaluating(model):
            tokens = model.text.encoder.tokenizer(list(said), list(of))
            found.append(model.text(*(x.to(device) for x in tokens)).cpu())
    place = {pair: number for number, pair in enumerate(pairs)}
    rows_of = [place[pair] for pair in zip(captions, languages, strict=True)]
    return torch.cat(found)[rows_of]


def embed_corpus(
    model: SupclapModel, corpus: Corpus, rows: int = 64, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Unit vectors of all M captions and N clips on the CPU: [M, D], [N, D]."""
    text = embed_text(model, corpus.captions, corpus.languages, rows)
    return text, torch.cat(list(embed_audio(model, corpus, rows, workers)))


def evaluate_corpus(
    model: SupclapModel, corpus: Corpus, rows: int = 64, workers: int = 0
) -> dict[str, Any]:
    """Metrics of a model on a corpus."""
    return corpus_metrics(*embed_corpus(model, corpus, rows, workers), corpus)


def corpus_metrics(text: Tensor, audio: Tensor, corpus: Corpus) -> dict[str, Any]:
    """Metrics "t2a" and "a2t" of the unit vectors of a corpus; with several languages their means,
    and "languages": those of each."""
    languages = sorted(set(corpus.languages))
    found = {}
    for language in languages:
        said = torch.tensor([one == language for one in corpus.languages])
        found[language] = retrieval_metrics(text[said], audio, corpus.clip_of[said])
    if len(languages) == 1:
        return found[languages[0]]
    return {**mean_metrics(list(found.values())), "languages": found}


def mean_metrics(several: list[dict[str, Metrics]]) -> dict[str, Metrics]:
    """Of each number in "t2a" and "a2t"."""
    return {
        way: {name: sum(m[way][name] for m in several) / len(several) for name in several[0][way]}
        for way in ("t2a", "a2t")
    }


@dataclass(frozen=True)
class Use:
    """How a model is put to use: where, how much at once, and how audio is read (data.py)."""

    device: str | torch.device = "cpu"
    skip_bad_audio: bool = False
    rows: int = 64  # encoded at once
    cache: str = "memory"
    workers: int = 0

    def corpus(self, model: SupclapModel, clips: list[Clip], source: Path) -> Corpus:
        """Clips, of the manifest `source`, as the model hears them."""
        return load_clips(
            clips, source, model.config.max_seconds, self.skip_bad_audio,
            front_end=model.audio.encoder.front_end, cache=self.cache, workers=self.workers,
        )  # fmt: skip


USE = Use()


def evaluate_run(run: Path, data: Path, use: Use = USE) -> tuple[dict[str, Any], Corpus]:
    """Metrics of a run's checkpoint on the manifest `data`, and the corpus measured. A checkpoint
    that was selected on a test set says so."""
    model = load_model(run).to(use.device)
    corpus = use.corpus(model, read_manifest(data), data)
    metrics = evaluate_corpus(model, corpus, use.rows, use.workers)
    if chosen_on_test(run):
        metrics["selected_on"] = "test"
    return metrics, corpus
