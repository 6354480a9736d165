"""From a manifest to batches: CSV, audio files, log-mel features, caption bytes.

A corpus is read once and its features are kept in memory as float16 (12.8 KB per second of
audio), so every file has been opened and checked before the first step.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from .config import UserError

# The front end of CED: 16 kHz, 32 ms windows, 10 ms hop, 64 HTK mel bins, decibels.
SAMPLE_RATE = 16_000
N_FFT = 512
HOP = 160
N_MELS = 64
F_MAX = 8_000.0
TOP_DB = 120.0
LOUDEST = 1e15  # its power is still a float32


@dataclass(frozen=True)
class Clip:
    """One audio file and its captions, as the manifest names them."""

    name: str
    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Clips in memory. A pair is one (clip, caption); captions are numbered clip by clip."""

    clips: list[Clip]
    features: list[Tensor]  # clip c: [F_c, N_MELS] float16, decibels
    skipped: list[str]  # one reason per clip left out

    @property
    def captions(self) -> list[str]:
        """All M captions."""
        return [caption for clip in self.clips for caption in clip.captions]

    @property
    def clip_of(self) -> Tensor:
        """[M] int64: the clip of each caption."""
        counts = torch.tensor([len(clip.captions) for clip in self.clips])
        return torch.repeat_interleave(torch.arange(len(self.clips)), counts)


def read_manifest(manifest: Path) -> list[Clip]:
    """Read `file_name, caption_1, ... caption_5`; rows of one file are joined to one clip.

    A file name is looked for in the manifest's own folder, then in `audio/` beside it.
    """
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise UserError(f"manifest not found: {manifest}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the manifest {manifest}: {error}") from error

    if not columns:
        raise UserError(f"manifest {manifest} is empty: it needs the columns file_name, caption_1")
    for needed in ("file_name", "caption_1"):
        if needed not in columns:
            raise UserError(
                f"manifest {manifest} has no column {needed!r}; it has {', '.join(columns)}"
            )
    if not rows:
        raise UserError(f"manifest {manifest} is empty: it has a header and no clip")

    caption_columns = [name for name in columns if name.startswith("caption_")]
    captions: dict[Path, list[str]] = {}
    names: dict[Path, str] = {}
    for line, row in rows:
        name = (row["file_name"] or "").strip()
        if not name:
            raise UserError(f"manifest {manifest}, line {line}: file_name is empty")
        if None in row:
            raise UserError(
                f"manifest {manifest}, line {line} ({name}): more fields than the header has "
                "columns; a caption with a comma in it needs quotes"
            )
        path = manifest.parent / name
        beside = manifest.parent / "audio" / name
        if not path.is_file() and beside.is_file():
            path = beside
        names.setdefault(path, name)
        for column in caption_columns:
            caption = " ".join((row[column] or "").split())
            if not caption:
                raise UserError(
                    f"manifest {manifest}, line {line} ({name}): {column} is empty; a clip with "
                    "fewer captions can have a row for each caption in a file with caption_1 only"
                )
            captions.setdefault(path, []).append(caption)
    return [Clip(names[path], path, tuple(texts)) for path, texts in captions.items()]


def load_audio(path: Path, max_seconds: float) -> np.ndarray:
    """The first `max_seconds` of any file soundfile reads, as mono float32 at 16 kHz: [S]."""
    if not path.is_file():
        raise UserError("no such file (looked in the manifest's folder and in audio/ beside it)")
    try:
        with soundfile.SoundFile(path) as source:
            rate = source.samplerate
            wave = source.read(math.ceil(max_seconds * rate), dtype="float32", always_2d=True)
        if len(wave) == 0:
            raise UserError("the clip has zero length")
        if not (np.abs(wave) < LOUDEST).all():
            raise UserError(f"the clip has NaN or infinite samples (or beyond {LOUDEST:g})")
        mono = wave.mean(axis=1)
        resampled = mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE)
    except (soundfile.SoundFileError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"not readable as audio: {error}") from error
    return resampled if len(resampled) else np.zeros(1, dtype=np.float32)


@cache
def mel_filters() -> Tensor:
    """[N_FFT / 2 + 1, N_MELS]: triangles of height 1, evenly spaced on the HTK mel scale."""
    top = 2595.0 * math.log10(1.0 + F_MAX / 700.0)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, top, N_MELS + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0).float()


def log_mel(wave: Tensor) -> Tensor:
    """[S] samples -> [F, N_MELS] decibels, F = 1 + S // HOP, at most TOP_DB below the peak."""
    padding = max(0, N_FFT - len(wave))  # a shorter clip cannot be reflected at its borders
    spectrum = torch.stft(
        torch.nn.functional.pad(wave, (0, padding)),
        N_FFT,
        hop_length=HOP,
        window=torch.hann_window(N_FFT),
        center=True,
        return_complex=True,
    )  # [N_FFT / 2 + 1, F]
    power = spectrum.abs().square().T @ mel_filters()
    decibels = 10.0 * power.clamp(min=1e-10).log10()
    return decibels.clamp(min=decibels.max() - TOP_DB)


def load_corpus(manifest: Path, max_seconds: float, skip_bad_audio: bool = False) -> Corpus:
    """Read a manifest and every clip of it; bad files are named, or skipped and counted."""
    clips, features, bad = [], [], []
    rows = read_manifest(manifest)
    for clip in tqdm(rows, desc=f"reading {manifest.name}", mininterval=1.0):
        try:
            wave = load_audio(clip.path, max_seconds)
        except UserError as error:
            bad.append(f"{clip.path}: {error}")
            continue
        clips.append(clip)
        features.append(log_mel(torch.from_numpy(wave)).half())
    if bad and not skip_bad_audio:
        shown = "\n  ".join(bad[:10] + ([f"... and {len(bad) - 10} more"] if bad[10:] else []))
        raise UserError(
            f"{len(bad)} of {len(bad) + len(clips)} audio files of {manifest} cannot be used "
            f"(--skip-bad-audio leaves them out):\n  {shown}"
        )
    if not clips:
        raise UserError(f"no audio file of {manifest} can be used; the first: {bad[0]}")
    return Corpus(clips, features, bad)


def pad_features(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """B clips of [F_c, N_MELS] -> [B, F, N_MELS] float32 padded at the end, and lengths [B]."""
    lengths = torch.tensor([len(clip) for clip in features])
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True).float(), lengths


def encode_captions(captions: list[str], max_bytes: int) -> Tensor:
    """B captions -> [B, L] int64: UTF-8 bytes of the lower-cased text plus 1, padded with 0."""
    rows = [torch.tensor(list(text.lower().encode()[:max_bytes])) + 1 for text in captions]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
