"""From a corpus to batches.

Every draw has its own seed, made of the run's, the epoch and the pair: a batch is the same whatever
the number of workers and wherever a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .corpus import Corpus
from .loader import load_items

Tokenizer = Callable[[list[str], list[str]], tuple[Tensor, ...]]
"""Captions and their languages -> what the text encoder takes, each [B, ...]."""


class Batch(NamedTuple):
    """Some pairs, as the encoders take them."""

    audio: tuple[Tensor, ...]  # features [B, F, M], lengths [B]; or a frozen encoder's [B, W]
    text: tuple[Tensor, ...]
    ids: Tensor | None  # [B] int64: pairs with equal ones are no negatives; None: all differ

    def to(self, device: torch.device) -> Batch:
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        ids = None if self.ids is None else move(self.ids)
        return Batch(tuple(map(move, self.audio)), tuple(map(move, self.text)), ids)


def pad_features(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pads B clips of [F_c, M] at the end: [B, F, M] float32, and lengths [B]."""
    lengths = torch.tensor([len(clip) for clip in features])
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True).float(), lengths


def joined(*labels: Tensor) -> Tensor:
    """Returns one number for all rows that are connected by equal labels, the first of them: [B]
    int64. labels: each [B]."""
    groups = [label.unique(return_inverse=True)[1] for label in labels]
    number = torch.arange(len(labels[0]))
    while True:
        before = number
        for group in groups:
            least = torch.full_like(number, len(number)).scatter_reduce(0, group, number, "amin")
            number = least[group]
        if torch.equal(number, before):
            return number


class Epoch:
    """The batches of an epoch: every (clip, caption) pair once, in random order. Each batch has the
    share of one rank."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        size: int,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        ranks: int = 1,
        whole: bool = False,
        ids: str = "clip",
    ) -> None:
        """`whole`: the last batch is left out if it is smaller; `ids`: what makes two pairs no
        negatives of each other (clip, caption, both, none)."""
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, (seed, epoch)
        self.ids, self.rank, self.ranks = ids, rank, ranks
        count = len(corpus.captions)
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))
        self.parts = order.split(size)[: steps_of(count, size, ranks, whole)]  # of all ranks

    def ids_of(self, pairs: Tensor) -> Tensor | None:
        """What equal pairs of a batch, of all ranks, have in common: [B] int64."""
        labels = {"clip": self.corpus.clip_of, "caption": self.corpus.sentence_of}
        if self.ids in labels:
            return labels[self.ids][pairs]
        return joined(*(label[pairs] for label in labels.values())) if self.ids == "both" else None

    def share(self, x: Tensor) -> Tensor:
        """Those of the rows of a batch that this rank has."""
        return x.tensor_split(self.ranks)[self.rank]

    def batch(self, number: int) -> Batch:
        corpus, ids = self.corpus, self.ids_of(self.parts[number])
        pairs = self.share(self.parts[number]).tolist()
        clips = corpus.clip_of[pairs]
        audio: tuple[Tensor, ...]
        if corpus.audio_outputs is not None:
            audio = (corpus.audio_outputs[clips],)
        else:
            each = zip(clips.tolist(), pairs, strict=True)
            audio = pad_features([corpus.features(c, [*self.seed, pair]) for c, pair in each])
        if corpus.text_outputs is not None:
            text: tuple[Tensor, ...] = (corpus.text_outputs[pairs],)
        else:
            captions = [corpus.captions[pair] for pair in pairs]
            text = self.tokenizer(captions, [corpus.languages[pair] for pair in pairs])
        return Batch(audio, text, None if ids is None else self.share(ids))

    def batches(self, start: int = 0, workers: int = 0, pin: bool = False) -> Iterator[Batch]:
        """Yields the batches from `start` on."""
        kept = self.corpus.kept is not None and not self.corpus.longer.any()
        workers = 0 if kept or self.corpus.audio_outputs is not None else workers
        yield from load_items(self.batch, range(start, len(self.parts)), workers, pin)


def steps_of(pairs: int, size: int, ranks: int = 1, whole: bool = False) -> int:
    """Returns the number of steps of an epoch. The last batch may be small, but every rank has a
    pair of it; `whole`: it is left out."""
    return pairs // size + (not whole and pairs % size >= ranks)
