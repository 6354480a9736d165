"""From a corpus to batches.

Every draw has its own seed, made of the run's, the epoch and the pair: a batch is the same whatever
the number of workers and wherever a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .augment import LEVEL, Augmentation, both_captions, louder, masked, mixed, some_words
from .corpus import Corpus, joined
from .leaks import sentence
from .loader import load_items

Tokenizer = Callable[[list[str], list[str]], tuple[Tensor, ...]]
"""Captions and their languages -> what the text encoder takes, each [B, ...]."""


class Batch(NamedTuple):
    """Some pairs, as the encoders take them."""

    audio: tuple[Tensor, ...]  # features [B, F, M], lengths [B]; or a frozen encoder's [B, W]
    text: tuple[Tensor, ...]  # [B, ...], and behind them captions that are wrong for some clips
    ids: Tensor | None  # [B] int64: pairs with equal ones are no negatives; None: all differ
    has_wrong: bool = False  # whether there may be such captions: on every rank or on none
    wrong_ids: Tensor | None = None  # [W] int64 of these captions, beside `ids`

    @property
    def pairs(self) -> int:
        return len(self.audio[0])

    def to(self, device: torch.device) -> Batch:
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        ids = None if self.ids is None else move(self.ids)
        audio, text = tuple(map(move, self.audio)), tuple(map(move, self.text))
        wrong_ids = None if self.wrong_ids is None else move(self.wrong_ids)
        return Batch(audio, text, ids, self.has_wrong, wrong_ids)


def pad_features(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pads B clips of [F_c, M] at the end: [B, F, M] float32, and lengths [B]."""
    lengths = torch.tensor([len(clip) for clip in features])
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True).float(), lengths


@dataclass
class Example:
    """A pair of a batch, and how it is changed."""

    pair: int
    seed: list[int]
    other: int | None = None  # the pair that is mixed with it

    @cached_property
    def rng(self) -> np.random.Generator:
        """Draws all but the part of the clip that is heard."""
        return np.random.default_rng([*self.seed, 1])


PLAIN = Augmentation()
TRIES = 8  # draws of a pair to be mixed with


class Epoch:
    """The batches of an epoch: every (clip, caption) pair once, or as often as its manifest's
    weight says, in random order. Each batch has the share of one rank."""

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
        augmentation: Augmentation = PLAIN,
        lasting: bool = False,
    ) -> None:
        """`whole`: the last batch is left out if it is smaller; `ids`: what makes two pairs no
        negatives of each other (clip, caption, both, none), `lasting`: by numbers that other
        batches have, too; `augmentation`: what is changed."""
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, (seed, epoch)
        self.ids, self.rank, self.ranks, self.augmentation = ids, rank, ranks, augmentation
        self.lasting = lasting
        self.count = len(corpus.captions)
        # Pairs, and their copies beyond the last pair.
        self.order = torch.from_numpy(corpus.draw(np.random.default_rng([seed, epoch])))
        steps = steps_of(len(self.order), size, ranks, whole)
        self.parts = self.order.split(size)[:steps]  # of all ranks

    def ids_of(self, pairs: Tensor) -> Tensor | None:
        """What equal pairs of a batch, of all ranks, have in common: [B] int64."""
        labels = {"clip": self.corpus.file_of, "caption": self.corpus.sentence_of}
        if self.ids in labels:
            return labels[self.ids][pairs]
        if self.ids == "none":
            return None
        if self.lasting:
            return self.corpus.group_of[pairs]
        return joined(*(label[pairs] for label in labels.values()))

    def share(self, x: Tensor) -> Tensor:
        """Those of the rows of a batch that this rank has."""
        return x.tensor_split(self.ranks)[self.rank]

    def batch(self, number: int) -> Batch:
        corpus, drawn, wrong = self.corpus, self.parts[number], list[tuple[str, str]]()
        ids, near = self.ids_of(drawn % self.count), self.near(drawn % self.count)
        examples = [self.example(n, near) for n in self.share(drawn).tolist()]
        pairs = torch.tensor([example.pair for example in examples])
        audio: tuple[Tensor, ...]
        if corpus.audio_outputs is not None:
            audio = (corpus.audio_outputs[corpus.clip_of[pairs]],)
        else:
            audio = pad_features([self.features(example) for example in examples])
        if corpus.text_outputs is not None:
            text: tuple[Tensor, ...] = (corpus.text_outputs[pairs],)
        else:
            captions = [self.caption(example) for example in examples]
            languages = [corpus.languages[pair] for pair in pairs.tolist()]
            wrong = self.wrong(examples) if corpus.has_wrong else []
            captions += [caption for caption, _ in wrong]
            text = self.tokenizer(captions, languages + [language for _, language in wrong])
        if ids is None:
            return Batch(audio, text, None, corpus.has_wrong)
        wrong_ids = self.ids_of_wrong([caption for caption, _ in wrong], drawn % self.count, ids)
        return Batch(audio, text, self.share(ids), corpus.has_wrong, wrong_ids)

    def near(self, pairs: Tensor) -> set[tuple[str, int]]:
        """The files and the sentences of a batch, if pairs are mixed."""
        if not self.augmentation.mix:
            return set()
        labels = {"file": self.corpus.file_of, "sentence": self.corpus.sentence_of}
        return {(name, n) for name, of in labels.items() for n in of[pairs].tolist()}

    @cached_property
    def alike(self) -> dict[str, np.ndarray]:
        """The pairs that the epoch draws, by language."""
        drawn = self.order.numpy() % self.count
        codes = np.array([self.corpus.languages[pair] for pair in drawn.tolist()])
        return {code: drawn[codes == code] for code in set(codes.tolist())}

    def example(self, number: int, near: set[tuple[str, int]]) -> Example:
        """Draws how one of the pairs of a batch is changed."""
        example = Example(number % self.count, [*self.seed, number])
        share = self.augmentation.mix
        if share and example.rng.random() < share:
            example.other = self.partner(example, near)
        return example

    def partner(self, example: Example, near: set[tuple[str, int]]) -> int | None:
        """Draws a pair to be mixed with: of the same language, and of no file and no sentence of
        the batch, where it would be a false negative. None after TRIES: a batch of all pairs is
        not mixed."""
        same, corpus = self.alike[self.corpus.languages[example.pair]], self.corpus
        for other in same[example.rng.integers(len(same), size=TRIES)].tolist():
            of = ("file", int(corpus.file_of[other])), ("sentence", int(corpus.sentence_of[other]))
            if near.isdisjoint(of):
                return int(other)
        return None

    def features(self, example: Example) -> Tensor:
        """[F, M] of an example's sound."""
        corpus, change, rng = self.corpus, self.augmentation, example.rng
        clip = int(corpus.clip_of[example.pair])
        if change.of_waves:
            wave = corpus.wave(clip, example.seed)
            if example.other is not None:
                other = corpus.wave(int(corpus.clip_of[example.other]), example.seed)
                wave = mixed(wave, other, rng.uniform(-LEVEL, LEVEL))
            features = corpus.front_end(louder(wave, rng.uniform(-change.gain, change.gain)))
        else:
            features = corpus.features(clip, example.seed)
        return masked(features, rng, change.spec_augment) if change.spec_augment else features

    def wrong(self, examples: list[Example]) -> list[tuple[str, str]]:
        """Draws a wrong caption, with the pair's language, for each clip that has some."""
        found = []
        for example in examples:
            texts = self.corpus.clips[int(self.corpus.clip_of[example.pair])].wrong
            if texts:
                caption = texts[int(example.rng.integers(len(texts)))]
                found.append((caption, self.corpus.languages[example.pair]))
        return found

    def ids_of_wrong(self, captions: list[str], pairs: Tensor, ids: Tensor) -> Tensor:
        """Of wrong captions, [W] int64: those of the pairs that have the same sentence, -1 for one
        that no pair has. pairs, ids: of the batch."""
        corpus = self.corpus
        if self.ids == "clip" or not captions:
            return torch.full((len(captions),), -1)
        known = corpus.sentence_of[pairs].tolist()
        if self.lasting:
            known, ids = corpus.sentence_of.tolist(), corpus.group_of
            ids = corpus.sentence_of if self.ids == "caption" else ids
        of = dict(zip(known, ids.tolist(), strict=True))
        numbers = [corpus.sentence_number.get(sentence(text), -1) for text in captions]
        return torch.tensor([of.get(number, -1) for number in numbers])

    def caption(self, example: Example) -> str:
        captions, share = self.corpus.captions, self.augmentation.caption_dropout
        caption = captions[example.pair]
        if example.other is not None:
            caption = both_captions(caption, captions[example.other])
        return some_words(caption, example.rng, share) if share else caption

    def batches(self, start: int = 0, workers: int = 0, pin: bool = False) -> Iterator[Batch]:
        """Yields the batches from `start` on."""
        kept = self.corpus.kept is not None and not self.corpus.longer.any()
        workers = 0 if kept or self.corpus.audio_outputs is not None else workers
        yield from load_items(self.batch, range(start, len(self.parts)), workers, pin)


def steps_of(pairs: int, size: int, ranks: int = 1, whole: bool = False) -> int:
    """Returns the number of steps of an epoch. The last batch may be small, but every rank has a
    pair of it; `whole`: it is left out."""
    return pairs // size + (not whole and pairs % size >= ranks)
