"""From clips to batches. What never changes is decoded once: the features of every clip, unless it
is longer than `max_seconds`, where training takes another part of it each time.

Every draw has its own seed, made of the run's, the epoch and the pair: a batch is the same whatever
the number of workers and wherever a run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .audio import FrontEnd, LogMel, load_audio, open_audio, read_duration
from .config import KILLED, Exhausted, UserError, explained
from .files import write_whole
from .folders import alike
from .manifest import SHOWN, Clip, read_manifest

CACHE = 2  # changes with what is found wrong with a file

Tokenizer = Callable[[list[str], list[str]], tuple[Tensor, ...]]
"""Captions and their languages -> what the text encoder takes, each [B, ...]."""


class Batch(NamedTuple):
    """Some pairs, as the encoders take them."""

    audio: tuple[Tensor, ...]  # features [B, F, M], lengths [B]
    text: tuple[Tensor, ...]
    ids: Tensor | None  # [B] int64, the clip of each pair; None: as if all were different

    def to(self, device: torch.device, with_ids: bool = True) -> Batch:
        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        ids = moved(self.ids) if with_ids and self.ids is not None else None
        return Batch(tuple(map(moved, self.audio)), tuple(map(moved, self.text)), ids)


@dataclass(frozen=True)
class Corpus:
    """Clips and their features. A pair is a (clip, caption); captions are numbered by clip."""

    clips: list[Clip]
    front_end: FrontEnd
    max_seconds: float
    skipped: list[str]  # one reason per clip left out
    kept: list[Tensor] | None  # [F_c, M] of each clip; None: decoded whenever it is asked for
    longer: Tensor  # [N] bool: whether a clip is cut to max_seconds

    @cached_property
    def captions(self) -> list[str]:
        """All M captions."""
        return [caption for clip in self.clips for caption in clip.captions]

    @cached_property
    def languages(self) -> list[str]:
        """Of all M captions."""
        return [language for clip in self.clips for language in clip.languages]

    @cached_property
    def clip_of(self) -> Tensor:
        """[M] int64: the clip of each caption."""
        counts = torch.tensor([len(clip.captions) for clip in self.clips])
        return torch.repeat_interleave(torch.arange(len(self.clips)), counts)

    def features(self, clip: int, seed: list[int] | None = None) -> Tensor:
        """[F, M] of one clip: its beginning, or a part that the seed draws."""
        if self.kept is not None and not (seed is not None and self.longer[clip]):
            return self.kept[clip]
        try:
            return decode(self.clips[clip], self.front_end, self.max_seconds, seed)
        except UserError as error:
            raise UserError(f"{self.clips[clip]}: {error}") from error

    @property
    def said(self) -> list[list[Any]]:
        """Name, captions and languages of each clip, wherever its file is: absolute names from the
        folder that they share, and as `alike` (folders.py)."""
        absolute = [Path(clip.name).parent for clip in self.clips if Path(clip.name).is_absolute()]
        base = os.path.commonpath(absolute) if absolute else ""
        paths = [Path(clip.name) for clip in self.clips]
        names = [alike(str(p.relative_to(base) if p.is_absolute() else p)) for p in paths]
        return [[n, c.captions, c.languages] for n, c in zip(names, self.clips, strict=True)]

    @cached_property
    def hashes(self) -> list[list[Any]]:
        """Name of each clip, and a checksum of what is said of it."""
        return [[name, zlib.crc32(json.dumps(texts).encode())] for name, *texts in self.said]

    @cached_property
    def fingerprint(self) -> str:
        """Of the pairs: a run that goes on must have the same."""
        return digest(self.said)

    def fits(self, fingerprint: str) -> bool:
        """Whether a fingerprint is of these pairs; earlier versions took the names as written."""
        written = [[clip.name, clip.captions, clip.languages] for clip in self.clips]
        return fingerprint in (self.fingerprint, digest(written))

    def sample(self, most: int = 1000) -> list[Tensor]:
        """Features of at most so many clips, evenly spread."""
        count = min(most, len(self.clips))
        return [self.features(n * len(self.clips) // count) for n in range(count)]


def digest(said: list[list[Any]]) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def decode(
    clip: Clip, front_end: FrontEnd, max_seconds: float, seed: list[int] | None = None
) -> Tensor:
    """Features [F, M] of a clip; an error without the file's name."""
    draw = None if seed is None else lambda n: int(np.random.default_rng(seed).integers(n))
    return front_end(load_audio(open_audio(clip), max_seconds, front_end.sample_rate, draw))


class Decoding(Dataset[tuple[Tensor | None, bool, str]]):
    """Features of a clip (None if they are not to be kept), whether it is longer than them, and
    what is wrong with it. `whole`: what is heard of it is decoded, not its header and end alone."""

    def __init__(
        self, clips: list[Clip], front_end: FrontEnd, max_seconds: float, keep: bool, whole: bool
    ) -> None:
        self.clips, self.front_end, self.max_seconds = clips, front_end, max_seconds
        self.keep, self.whole = keep, whole

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> tuple[Tensor | None, bool, str]:
        clip = self.clips[number]
        try:
            seconds = read_duration(open_audio(clip))
            if not seconds:
                raise UserError("the clip has zero length")
            found = decode(clip, self.front_end, self.max_seconds) if self.whole else None
        except Exhausted:  # no fault of the file
            raise
        except UserError as error:
            return None, False, str(error)
        return found if self.keep else None, seconds > self.max_seconds, ""


def leave_signals(worker: int) -> None:
    """In a worker: the parent ends it, no Ctrl-C or SIGTERM that the whole job gets. The parent is
    in the middle of a step then, and the batch it waits for still comes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

    parent = multiprocessing.parent_process()

    def obey() -> None:
        while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=obey, daemon=True).start()


class Told(Dataset[Any]):
    """A dataset whose UserErrors are items: a worker process would wrap them in its traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except UserError as error:
            return str(error)


def loaded(
    dataset: Dataset[Any], order: Any = None, workers: int = 0, pin: bool = False
) -> Iterator[Any]:
    """Items of a dataset, one by one, prepared in `workers` processes; no global random number is
    drawn."""
    numbers = range(len(dataset)) if order is None else order  # type: ignore[arg-type]
    items = DataLoader(
        Told(dataset),
        batch_size=None,
        sampler=numbers,
        num_workers=min(workers, len(numbers)),
        pin_memory=pin,
        generator=torch.Generator(),
        worker_init_fn=leave_signals if hasattr(signal, "sigwaitinfo") else None,
    )
    try:
        for item in items:
            if isinstance(item, str):
                raise UserError(item)
            yield item
    except RuntimeError as error:
        known = explained(error)
        if known is None:
            raise
        raise known from error
    except (ConnectionError, EOFError) as error:  # it was killed while it sent a batch
        raise UserError(KILLED.format(str(error) or "it hung up")) from error


def cache_file(folder: Path, clips: list[Clip], front_end: FrontEnd, max_seconds: float) -> Path:
    """Where the features of just these files are kept."""
    said = []
    for clip in clips:
        found = clip.path.stat() if clip.path.is_file() else None
        file = (found.st_size, found.st_mtime_ns) if found else None
        said.append([str(clip.path.resolve()), clip.span, file])
    whole = json.dumps([CACHE, front_end.key, max_seconds, said])
    return folder / f"features-{hashlib.sha256(whole.encode()).hexdigest()[:16]}.safetensors"


def read_cache(path: Path, count: int) -> list[tuple[Tensor | None, bool, str]] | None:
    """Mapped from the file, not read; None if there is none, or a broken one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as stored:
            said = json.loads(stored.metadata()["said"])
            parts = [stored.get_tensor(str(n)) if not said[n][1] else None for n in range(count)]
    except (SafetensorError, OSError, KeyError, IndexError, ValueError):
        return None
    return [(x, longer, problem) for x, (longer, problem) in zip(parts, said, strict=True)]


def load_corpus(
    manifest: Path, max_seconds: float, skip_bad_audio: bool = False, **options: Any
) -> Corpus:
    """Read a manifest and every clip of it; options as of `load_clips`."""
    return load_clips(read_manifest(manifest), manifest, max_seconds, skip_bad_audio, **options)


def load_clips(
    rows: list[Clip],
    manifest: Path,
    max_seconds: float,
    skip_bad_audio: bool = False,
    *,
    front_end: FrontEnd | None = None,
    cache: str = "memory",
    workers: int = 0,
) -> Corpus:
    """Read every clip; bad files are named, as of `manifest`, or skipped and counted.

    cache: "memory", "off" (decoded whenever asked for; now only headers are read, unless bad files
    are to be skipped) or a folder. A clip is cut to max_seconds and to what the front end hears.
    """
    front_end = front_end or LogMel()
    max_seconds = min(max_seconds, front_end.seconds)
    folder = None if cache in ("memory", "off") else Path(cache)
    stored = None if folder is None else cache_file(folder, rows, front_end, max_seconds)
    found = None if stored is None else read_cache(stored, len(rows))
    if found is None:
        keep = cache != "off"
        work = Decoding(rows, front_end, max_seconds, keep, whole=keep or skip_bad_audio)
        items = loaded(work, workers=workers)
        bar = tqdm(items, f"reading {manifest.name}", len(rows), mininterval=1.0)
        # A copy: what a worker sends is in shared memory.
        found = [(None if x is None else x.clone(), longer, said) for x, longer, said in bar]
        if stored is not None:
            said = json.dumps([(longer, problem) for _, longer, problem in found])
            tensors = {str(n): x for n, (x, *_) in enumerate(found) if x is not None}
            stored.parent.mkdir(parents=True, exist_ok=True)
            write_whole(stored, lambda path: save_file(tensors, path, {"said": said}))

    bad = [f"{c}: {said}" for c, (*_, said) in zip(rows, found, strict=True) if said]
    if bad and not skip_bad_audio:
        shown = bad[:SHOWN] + ([f"... and {len(bad) - SHOWN} more"] if bad[SHOWN:] else [])
        raise UserError(
            f"{len(bad)} of {len(rows)} audio files of {manifest} cannot be used "
            "(--skip-bad-audio leaves them out):\n  " + "\n  ".join(shown)
        )
    if len(bad) == len(rows):
        raise UserError(f"no audio file of {manifest} can be used; the first: {bad[0]}")
    good = [(clip, *one) for clip, one in zip(rows, found, strict=True) if not one[2]]
    kept = None if cache == "off" else [x for _, x, _, _ in good if x is not None]
    longer = torch.tensor([one for _, _, one, _ in good])
    return Corpus([clip for clip, *_ in good], front_end, max_seconds, bad, kept, longer)


def pad_features(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """B clips of [F_c, M] -> [B, F, M] float32 padded at the end, and lengths [B]."""
    lengths = torch.tensor([len(clip) for clip in features])
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True).float(), lengths


class Bytes:
    """The built-in tokenizer: UTF-8 bytes of the lower-cased text plus 1, padded with 0."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes

    def __call__(self, captions: list[str], languages: list[str]) -> tuple[Tensor, ...]:
        rows = [
            torch.tensor(list(text.lower().encode()[: self.max_bytes])) + 1 for text in captions
        ]
        return (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),)


class Epoch(Dataset[Batch]):
    """The batches of an epoch: every (clip, caption) pair once, in random order; of each batch the
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
    ) -> None:
        """`whole`: without the last batch if it is smaller."""
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, (seed, epoch)
        count = len(corpus.captions)
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))
        parts = order.split(size)[: steps_of(count, size, ranks, whole)]
        self.parts = [pairs.tensor_split(ranks)[rank] for pairs in parts]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Batch:
        corpus, pairs = self.corpus, self.parts[number].tolist()
        clips = corpus.clip_of[pairs]
        parts = [
            corpus.features(clip, [*self.seed, pair])
            for clip, pair in zip(clips.tolist(), pairs, strict=True)
        ]
        text = self.tokenizer(
            [corpus.captions[pair] for pair in pairs], [corpus.languages[pair] for pair in pairs]
        )
        return Batch(pad_features(parts), text, clips)

    def batches(self, start: int = 0, workers: int = 0, pin: bool = False) -> Iterator[Batch]:
        """From batch `start` on."""
        still = self.corpus.kept is not None and not self.corpus.longer.any()
        yield from loaded(self, range(start, len(self)), 0 if still else workers, pin)


def steps_of(pairs: int, size: int, ranks: int = 1, whole: bool = False) -> int:
    """Of an epoch: the last batch may be small, but every rank has a pair of it."""
    return pairs // size + (not whole and pairs % size >= ranks)
