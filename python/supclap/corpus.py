"""Clips and their features. What never changes is decoded once, the features of every clip, unless
it is longer than `max_seconds`, of which training takes another part each time, or its samples are
changed (augment.py)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .audio import FrontEnd, LogMel, load_audio, load_first, open_audio, read_duration
from .cache import Decoded, FeatureCache, digest, key_of
from .errors import Exhausted, UserError
from .folders import alike
from .leaks import sentence
from .loader import load_items
from .manifest import SHOWN, Clip, read_manifest
from .model import SupclapModel
from .progress import Bar


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


@contextlib.contextmanager
def naming(clip: Clip) -> Iterator[None]:
    """Names the clip in an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{clip}: {error}") from error


@dataclass(frozen=True)
class Corpus:
    """Clips and their features. A pair is a (clip, caption); captions are numbered by clip."""

    clips: list[Clip]
    front_end: FrontEnd
    max_seconds: float
    skipped: list[str]  # one reason per clip left out
    kept: list[Tensor] | None  # [F_c, M] of each clip; None: decoded whenever it is asked for
    longer: Tensor  # [N] bool: whether a clip is cut to max_seconds
    audio_outputs: Tensor | None = None  # [N, W]: what a frozen encoder makes of the clips
    text_outputs: Tensor | None = None  # [M, W]: ... of the captions
    shares: tuple[tuple[int, float], ...] = ()  # pairs and weight of each manifest; (): once
    several: bool = False  # whether the clips are of several manifests

    @cached_property
    def captions(self) -> list[str]:
        """Returns all M captions."""
        return [caption for clip in self.clips for caption in clip.captions]

    @cached_property
    def languages(self) -> list[str]:
        """Returns the language of each of the M captions."""
        return [language for clip in self.clips for language in clip.languages]

    @cached_property
    def clip_of(self) -> Tensor:
        """Returns the clip of each caption: [M] int64."""
        counts = torch.tensor([len(clip.captions) for clip in self.clips])
        return torch.repeat_interleave(torch.arange(len(self.clips)), counts)

    @cached_property
    def sentence_number(self) -> dict[str, int]:
        """Numbers the sentences of the captions."""
        return {text: n for n, text in enumerate(dict.fromkeys(map(sentence, self.captions)))}

    @cached_property
    def sentence_of(self) -> Tensor:
        """Returns the number of each caption's sentence: [M] int64."""
        return torch.tensor([self.sentence_number[sentence(c)] for c in self.captions])

    @cached_property
    def file_of(self) -> Tensor:
        """Returns a number for each caption, equal for captions of one file, in whatever manifest:
        [M] int64."""
        if not self.several:
            return self.clip_of
        number: dict[Any, int] = {}
        keys = [(os.path.realpath(clip.path), clip.span, clip.cell) for clip in self.clips]
        return torch.tensor([number.setdefault(k, len(number)) for k in keys])[self.clip_of]

    @cached_property
    def group_of(self) -> Tensor:
        """Returns a number for each caption, equal for all that are connected by files and
        sentences: [M] int64."""
        return joined(self.file_of, self.sentence_of)

    @cached_property
    def has_wrong(self) -> bool:
        """Whether clips have captions that are wrong for them."""
        return any(clip.wrong for clip in self.clips)

    @property
    def taken(self) -> int:
        """How many pairs an epoch takes."""
        return sum(map(count_taken, self.shares)) if self.shares else len(self.captions)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Returns what an epoch takes, in random order: pairs, and beyond the last pair their
        copies, pair + M, pair + 2 M, ..."""
        every = len(self.captions)
        if not self.shares:
            return rng.permutation(every)
        taken, first = [], 0
        for share in self.shares:
            pairs, weight = share
            rounds = [n * every + rng.permutation(pairs) for n in range(math.ceil(weight))]
            taken.append(first + np.concatenate(rounds)[: count_taken(share)])
            first += pairs
        return rng.permutation(np.concatenate(taken))

    def wave(self, clip: int, seed: list[int] | None = None) -> np.ndarray:
        """Returns the samples [S] of one clip: of its beginning, or of a part that the seed
        draws."""
        draw = None if seed is None else lambda n: int(np.random.default_rng(seed).integers(n))
        with naming(self.clips[clip]):
            source = open_audio(self.clips[clip])
            return load_audio(source, self.max_seconds, self.front_end.sample_rate, draw)

    def features(self, clip: int, seed: list[int] | None = None) -> Tensor:
        """Returns [F, M] of one clip: its beginning, or a part that the seed draws."""
        if self.kept is not None and not (seed is not None and self.longer[clip]):
            return self.kept[clip]
        wave = self.wave(clip, seed)
        with naming(self.clips[clip]):
            return self.front_end(wave)

    @property
    def records(self) -> list[list[Any]]:
        """Returns name, captions and languages of each clip, wherever its file is: absolute names
        from the folder that they share, and as `alike` (folders.py)."""
        absolute = [Path(clip.name).parent for clip in self.clips if Path(clip.name).is_absolute()]
        base = os.path.commonpath(absolute) if absolute else ""
        paths = [Path(clip.name) for clip in self.clips]
        names = [alike(str(p.relative_to(base) if p.is_absolute() else p)) for p in paths]
        return [
            [n, c.captions, c.languages, *([c.wrong] if c.wrong else [])]
            for n, c in zip(names, self.clips, strict=True)
        ]

    @cached_property
    def hashes(self) -> list[list[Any]]:
        """Returns the name of each clip, and a checksum of its captions and languages."""
        return [[name, zlib.crc32(json.dumps(texts).encode())] for name, *texts in self.records]

    @cached_property
    def fingerprint(self) -> str:
        """Returns a checksum of the pairs: a run that goes on must have the same."""
        return digest(self.records)

    def fits(self, fingerprint: str) -> bool:
        """Whether a fingerprint is of these pairs; earlier versions took the names as written."""
        written = [[clip.name, clip.captions, clip.languages] for clip in self.clips]
        return fingerprint in (self.fingerprint, digest(written))

    def sample(self, most: int = 1000) -> list[Tensor]:
        """Returns the features of at most `most` clips, evenly spread."""
        count = min(most, len(self.clips))
        return [self.features(n * len(self.clips) // count) for n in range(count)]


def count_taken(share: tuple[int, float]) -> int:
    """Returns how many pairs an epoch takes of a manifest, by its pairs and its weight."""
    pairs, weight = share
    return max(1, round(pairs * weight))


def read_clip(
    clip: Clip, front_end: FrontEnd, max_seconds: float, keep: bool, whole: bool
) -> Decoded:
    """Reads a clip. `whole`: decodes all that is heard of it, not its header and end alone."""
    features = None
    try:
        source = open_audio(clip)
        if whole:
            seconds, wave = load_first(source, max_seconds, front_end.sample_rate)
            features = front_end(wave)
        else:
            seconds = read_duration(source)
        if not seconds:
            raise UserError("the clip has zero length")
    except Exhausted:  # no fault of the file
        raise
    except UserError as error:
        return Decoded(None, False, str(error))
    return Decoded(features if keep else None, seconds > max_seconds, "")


@dataclass(frozen=True)
class ReadOptions:
    """How clips are read: the settings of these names."""

    skip_bad_audio: bool = False  # bad files are skipped and counted, not an error
    cache: str = "memory"  # "off": decoded whenever asked for; else a folder
    workers: int = 0
    check: bool = False  # with the cache off, too, every clip is decoded once and found good


def decode_clips(
    clips: list[Clip], front_end: FrontEnd, max_seconds: float, options: ReadOptions, bar: Any
) -> list[Decoded]:
    """Reads clips, those that the cache has not; `bar` is told of each."""
    keep = options.cache != "off"
    cache = None
    if options.cache not in ("memory", "off"):
        cache = FeatureCache(Path(options.cache), front_end, max_seconds)
    keys = list(map(key_of, clips))
    known = cache.find(keys) if cache else dict[str, Decoded]()
    new = {key: clip for key, clip in zip(keys, clips, strict=True) if key not in known}
    bar.update(len(clips) - len(new))
    if new:
        read = partial(
            read_clip, front_end=front_end, max_seconds=max_seconds, keep=keep,
            whole=keep or options.check or options.skip_bad_audio,
        )  # fmt: skip
        items = load_items(read, list(new.values()), options.workers)
        for key, x in zip(new, items, strict=True):  # a copy: it may be in a worker's memory
            known[key] = x if x.features is None else x._replace(features=x.features.clone())
            bar.update()
        if cache is not None:
            cache.add({key: known[key] for key in new})
    return [known[key] for key in keys]


def problems_of(clips: list[Clip], decoded: list[Decoded], manifest: Path, skip: bool) -> list[str]:
    """Returns what is wrong with clips, if they are to be skipped; else it is an error."""
    bad = [f"{clip}: {x.problem}" for clip, x in zip(clips, decoded, strict=True) if x.problem]
    if bad and not skip:
        shown = bad[:SHOWN] + ([f"... and {len(bad) - SHOWN} more"] if bad[SHOWN:] else [])
        raise UserError(
            f"{len(bad)} of {len(clips)} audio files of {manifest} cannot be used "
            "(--skip-bad-audio leaves them out):\n  " + "\n  ".join(shown)
        )
    return bad


def check_any_left(clips: list[Clip], bad: list[str], manifest: Path) -> None:
    if len(bad) == len(clips):
        raise UserError(f"no audio file of {manifest} can be used; the first: {bad[0]}")


def read_clips(
    clips: list[Clip], manifest: Path, front_end: FrontEnd, max_seconds: float, options: ReadOptions
) -> Corpus:
    """Reads every clip, cut to max_seconds and to what the front end hears. With the cache off only
    headers are read, unless bad files are to be skipped. An error names them, as of `manifest`."""
    max_seconds = min(max_seconds, front_end.seconds)
    with Bar(total=len(clips), desc=f"reading {manifest.name}") as bar:
        decoded = decode_clips(clips, front_end, max_seconds, options, bar)
    bad = problems_of(clips, decoded, manifest, options.skip_bad_audio)
    check_any_left(clips, bad, manifest)
    good = [clip for clip, x in zip(clips, decoded, strict=True) if not x.problem]
    keep = options.cache != "off"
    kept = [x.features for x in decoded if x.features is not None] if keep else None
    longer = torch.tensor([x.longer for x in decoded if not x.problem])
    return Corpus(good, front_end, max_seconds, bad, kept, longer)


def join(corpora: list[Corpus], weights: tuple[float, ...]) -> Corpus:
    """Returns the clips of all corpora as one. `weights`: how often an epoch takes the pairs of
    each; (): once."""
    first, *others = corpora
    if not others and not weights:
        return first
    every = [x.kept for x in corpora]
    counts = [len(x.captions) for x in corpora]
    return replace(
        first,
        clips=[clip for x in corpora for clip in x.clips],
        skipped=[reason for x in corpora for reason in x.skipped],
        kept=None if None in every else [clip for kept in every for clip in kept or ()],
        longer=torch.cat([x.longer for x in corpora]),
        shares=tuple(zip(counts, weights, strict=True)) if weights else (),
        several=True,
    )


def load_corpus(
    manifest: Path, max_seconds: float, front_end: FrontEnd | None = None, **options: Any
) -> Corpus:
    """Reads a manifest and every clip of it; options as of ReadOptions."""
    clips = read_manifest(manifest)
    return read_clips(clips, manifest, front_end or LogMel(), max_seconds, ReadOptions(**options))


def read_as_heard(
    model: SupclapModel, clips: list[Clip], manifest: Path, options: ReadOptions
) -> Corpus:
    """Reads clips as a model hears them: with its front end, no longer than it takes."""
    front_end, max_seconds = model.audio.encoder.front_end, model.config.max_seconds
    return read_clips(clips, manifest, front_end, max_seconds, options)
