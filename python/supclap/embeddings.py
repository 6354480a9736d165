"""Unit vectors of clips and captions, by a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .batches import pad_features
from .corpus import Corpus, ReadOptions
from .loader import load_items
from .model import SupclapModel, evaluating


@dataclass(frozen=True)
class EmbedOptions(ReadOptions):
    """How clips are read and encoded: what every command on a run shares."""

    device: str | torch.device = "cpu"
    batch_size: int = 64  # clips or captions encoded at once


DEFAULTS = EmbedOptions()


def padded_features(clips: range, corpus: Corpus) -> tuple[Tensor, ...]:
    return pad_features([corpus.features(clip) for clip in clips])


def embed_audio(
    model: SupclapModel, corpus: Corpus, batch_size: int = 64, workers: int = 0
) -> Iterator[Tensor]:
    """Yields the unit vectors of some clips at a time, on the CPU: [at most batch_size, D]."""
    device = model.log_scale.device
    workers = 0 if corpus.kept is not None else workers
    clips = range(len(corpus.clips))
    parts = [clips[start : start + batch_size] for start in clips[::batch_size]]
    for batch in load_items(partial(padded_features, corpus=corpus), parts, workers):
        with evaluating(model):
            vectors = model.audio(*(x.to(device) for x in batch)).cpu()
        yield vectors


def embed_text(
    model: SupclapModel, captions: list[str], languages: list[str], batch_size: int = 64
) -> Tensor:
    """Returns the unit vectors of captions, on the CPU: [M, D]. Equal captions are encoded once:
    else they would be padded to another length, rounded otherwise, and no longer tie."""
    device, vectors = model.log_scale.device, []
    pairs = list(zip(captions, languages, strict=True))
    row_of = {pair: row for row, pair in enumerate(dict.fromkeys(pairs))}
    unique = list(row_of)
    for start in range(0, len(unique), batch_size):
        texts, codes = zip(*unique[start : start + batch_size], strict=True)
        with evaluating(model):
            tokens = model.text.encoder.tokenizer(list(texts), list(codes))
            vectors.append(model.text(*(x.to(device) for x in tokens)).cpu())
    return torch.cat(vectors)[[row_of[pair] for pair in pairs]]


def embed_corpus(
    model: SupclapModel, corpus: Corpus, batch_size: int = 64, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns the unit vectors of all M captions and N clips, on the CPU: [M, D], [N, D]."""
    text = embed_text(model, corpus.captions, corpus.languages, batch_size)
    return text, torch.cat(list(embed_audio(model, corpus, batch_size, workers)))
