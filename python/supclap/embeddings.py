"""Unit vectors of clips and captions, by a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

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


class Features(Dataset[tuple[Tensor, ...]]):
    """The features of a corpus, `batch_size` clips at a time, padded, and their lengths."""

    def __init__(self, corpus: Corpus, batch_size: int) -> None:
        self.corpus, self.batch_size = corpus, batch_size

    def __len__(self) -> int:
        return -(-len(self.corpus.clips) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        clips = range(len(self.corpus.clips))[number * self.batch_size :][: self.batch_size]
        return pad_features([self.corpus.features(clip) for clip in clips])


def embed_audio(
    model: SupclapModel, corpus: Corpus, batch_size: int = 64, workers: int = 0
) -> Iterator[Tensor]:
    """Yields the unit vectors of some clips at a time, on the CPU: [at most batch_size, D]."""
    device = model.log_scale.device
    workers = 0 if corpus.kept is not None else workers
    for batch in load_items(Features(corpus, batch_size), workers=workers):
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
