"""Retrieval metrics in both directions, and the rule they follow.

Text and audio are compared by plain inner products; support vectors play no part.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .data import Corpus, encode_captions, load_corpus, pad_features
from .model import SupclapModel, load_checkpoint

RULE = (
    "t2a: every caption is a query over the unique clips; mAP@10 = mean of 1/rank if rank <= 10, "
    "else 0. a2t: one query per clip over all captions; R@k and the median use the best rank of "
    "the clip's captions; AP@10 = sum over its hits in the top 10 of i/rank_i, divided by its "
    "number of captions. rank = 1 + number of others scoring >= it, so a tie counts against the "
    "model (captions of one clip that tie with each other rank in turn). median_rank = "
    "floor(median of the 0-based ranks) + 1. R@k and mAP@10 are fractions."
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
    """For each of the N clips the ranks of its own captions among all M, best first."""
    order = clip_of.argsort(stable=True)
    captions = order.split(torch.bincount(clip_of, minlength=len(audio)).tolist())
    ranks = []
    for clip, own in enumerate(captions):
        scores = text @ audio[clip]  # [M]
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
    reciprocal = torch.where(t2a <= 10, 1.0 / t2a, 0.0)
    a2t = audio_to_text_ranks(text, audio, clip_of)
    precision = [
        (torch.arange(1, len(r) + 1) / r * (r <= 10)).sum() / len(r) for r in a2t
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


@torch.no_grad()
def embed_corpus(model: SupclapModel, corpus: Corpus, rows: int = 64) -> tuple[Tensor, Tensor]:
    """Unit vectors of all M captions and N clips on the CPU: [M, D], [N, D]."""
    device = model.log_scale.device
    model.eval()
    audio = []
    for start in range(0, len(corpus.clips), rows):
        mel, lengths = pad_features(corpus.features[start : start + rows])
        audio.append(model.audio(mel.to(device), lengths.to(device)).cpu())
    captions, text = corpus.captions, []
    for start in range(0, len(captions), rows):
        encoded = encode_captions(captions[start : start + rows], model.config.max_bytes)
        text.append(model.text(encoded.to(device)).cpu())
    return torch.cat(text), torch.cat(audio)


def evaluate_corpus(model: SupclapModel, corpus: Corpus) -> dict[str, Metrics]:
    """Metrics of a model on a corpus in memory."""
    text, audio = embed_corpus(model, corpus)
    return retrieval_metrics(text, audio, corpus.clip_of)


def evaluate_run(
    run: Path, data: Path, device: str | torch.device = "cpu", skip_bad_audio: bool = False
) -> tuple[dict[str, Metrics], Corpus]:
    """Metrics of a run's checkpoint on the manifest `data`, and the corpus measured."""
    model = load_checkpoint(run).to(device)
    corpus = load_corpus(data, model.config.max_seconds, skip_bad_audio)
    return evaluate_corpus(model, corpus), corpus
