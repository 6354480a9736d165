"""From an audio file to features: any file soundfile reads, mono, resampled, log-mel."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import BinaryIO, Protocol

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from .errors import UserError, explained
from .manifest import Clip
from .mp3 import bit_rates
from .parquet import read_cell

# The front end of CED: 16 kHz, 32 ms windows, 10 ms hop, 64 HTK mel bins, decibels.
SAMPLE_RATE = 16_000
N_FFT = 512
HOP = 160
N_MELS = 64
F_MAX = 8_000.0
TOP_DB = 120.0
LOUDEST = 1e15  # its power is still a float32
END = 0.1  # seconds that may be missing at the end: a frame of MP3 is up to 0.072
UNKNOWN = 2**62  # frames, of a file whose header does not say
BLOCK = 2**18  # frames decoded at a time where only their number counts
EDGE = 2**17  # bytes; a page of Ogg has at most 65,307
SIZES = re.compile(r"^([ \w]+?) *: (\d+) \(should be (\d+)\)", re.M)
JUNK = re.compile(r"^Ogg ?: Junk after the last page\.", re.M)
STREAMED = 0x7FFF_0000  # bytes and more: of a header written before the length was known


class FrontEnd(Protocol):
    """What an audio encoder makes of a clip, in any process."""

    sample_rate: int
    seconds: float  # of a clip that it hears; longer ones are cut

    @property
    def key(self) -> str:
        """Names the features: of two front ends with one key they are the same."""

    def __call__(self, wave: np.ndarray) -> Tensor:
        """Makes features [F, M] of samples [S], float32, at `sample_rate`."""


def open_audio(clip: Clip) -> bytes | BinaryIO:
    """Returns what soundfile reads: the name of the clip's file, or its bytes in a larger one."""
    if not clip.path.is_file():
        raise UserError("no such file (looked in the manifest's folder and in audio/ beside it)")
    if clip.cell is not None:
        return io.BytesIO(read_cell(clip.path, clip.cell))
    if clip.span is None:
        return os.fsencode(clip.path)  # names that are not UTF-8, too
    start, size = clip.span
    with clip.path.open("rb") as stream:
        stream.seek(start)
        return io.BytesIO(stream.read(size))


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turns what the libraries say of a file into a UserError."""
    try:
        yield
    except (soundfile.SoundFileError, OSError, RuntimeError, ValueError, TypeError) as error:
        reason = getattr(error, "error_string", error)  # the library's, without the file's name
        raise explained(error) or UserError(f"not readable as audio: {reason}") from error


def read_wave(
    opened: soundfile.SoundFile, max_seconds: float, draw: Callable[[int], int] | None = None
) -> np.ndarray:
    """Reads at most `max_seconds` of a file, as mono float32 [S].

    These are the first ones, or those from frame draw(n) on, if the file has n - 1 frames more.
    """
    frames = math.ceil(max_seconds * opened.samplerate)
    if draw is not None and opened.frames > frames:
        wave = read_from(opened, draw(opened.frames - frames + 1), frames)
    else:
        wave = opened.read(frames, dtype="float32", always_2d=True)
    return mono(wave)


def read_from(opened: soundfile.SoundFile, start: int, frames: int) -> np.ndarray:
    """Reads [frames, channels] from a place on; the last ones if fewer are there than guessed."""
    try:
        opened.seek(start)
        wave = opened.read(frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError):
        wave = np.zeros((0, opened.channels), dtype=np.float32)
    if len(wave) < frames - math.ceil(END * opened.samplerate):
        opened.seek(0)
        wave = opened.read(dtype="float32", always_2d=True)[-frames:]
    return wave


def check_samples(wave: np.ndarray) -> None:
    """Raises an error unless there are samples [S, channels], and all of them are numbers."""
    if len(wave) == 0:
        raise UserError("the clip has zero length")
    if not (np.abs(wave) < LOUDEST).all():
        raise UserError(f"the clip has NaN or infinite samples (or beyond {LOUDEST:g})")


def mono(wave: np.ndarray) -> np.ndarray:
    """Checks samples [S, channels] and returns their mean over channels: [S]."""
    check_samples(wave)
    channels = wave.shape[1]
    if channels <= 2:  # several times as fast as NumPy's mean over so few, and the same bits
        return wave[:, 0] if channels == 1 else (wave[:, 0] + wave[:, 1]) / np.float32(2)
    mean: np.ndarray = wave.mean(axis=1)
    return mean


def read_part(source: bytes | BinaryIO, start: int, size: int = -1) -> bytes:
    """Reads bytes of a file from a place on, which counts from the end if it is negative."""
    if isinstance(source, bytes):
        with open(source, "rb") as stream:
            return read_part(stream, start, size)
    place, length = source.tell(), source.seek(0, os.SEEK_END)
    source.seek(start if start >= 0 else max(0, length + start))
    raw = source.read(size)
    source.seek(place)
    return raw


def is_tagged(source: bytes | BinaryIO) -> bool:
    """Whether an MP3 says how long it is, behind the pictures and names of an ID3 tag."""
    head = read_part(source, 0, 10)
    size = sum((byte & 127) << 7 * (3 - n) for n, byte in enumerate(head[6:]))
    first = read_part(source, 10 + size if head.startswith(b"ID3") else 0, EDGE)
    return any(name in first for name in (b"Xing", b"Info", b"VBRI"))


def page_is_cut(last: bytes) -> bool:
    """Whether the last page of an Ogg stream is not whole, or not marked as its end."""
    at = last.rfind(b"OggS")
    if len(last) < at + 27:
        return True
    lengths = last[at + 27 : at + 27 + last[at + 26]]
    return at + 27 + last[at + 26] + sum(lengths) > len(last) or not last[at + 5] & 4


def header_promise(opened: soundfile.SoundFile, source: bytes | BinaryIO) -> tuple[bool, str]:
    """Whether a header says how long a file is, and how it differs from what is there ("": not)."""
    seconds = opened.frames / opened.samplerate
    for name, promised, present in SIZES.findall(opened.extra_info):
        missing = int(promised) - int(present)  # bytes
        counts = name.strip() not in ("RIFF", "FORM") and int(promised) < STREAMED
        if counts and missing * seconds > END * int(present):
            return True, f"{present} of the {promised} bytes its header promises are there"
    if "\nSeems to be a truncated file." in opened.extra_info:  # VOC
        return True, f"it ends after {seconds:.2f} seconds"
    is_ogg = opened.format == "OGG" and JUNK.search(opened.extra_info)
    if is_ogg and page_is_cut(read_part(source, -EDGE)):
        return True, f"it ends after {seconds:.2f} seconds"
    if opened.format == "NIST":
        count = re.search(rb"sample_count -i (\d+)", read_part(source, 0, 1024))
        samples = int(count[1]) if count else 0
        if samples - opened.frames > END * opened.samplerate:
            return True, f"{opened.frames} of the {samples} samples its header promises are there"
    return opened.format != "MP3" or is_tagged(source), ""


def duration_of(opened: soundfile.SoundFile, source: bytes | BinaryIO) -> float:
    """Returns the seconds of a file whose end is there: what its header promises can be decoded.

    The library says what it had to put right in a header, and seeks to the end without decoding
    what is before it.
    """
    frames, rate = opened.frames, opened.samplerate
    if frames >= UNKNOWN:
        raise UserError("its header does not say how long it is; write it anew with its length")
    if not opened.seekable():
        raise UserError("the decoder cannot search a file of this kind; convert it, say to FLAC")
    seconds = frames / rate
    promised, difference = header_promise(opened, source)
    if difference:
        raise UserError(f"it is cut off: {difference}")
    if not promised:  # the library guesses the length from the size and the first frame
        if len(bit_rates(read_part(source, 0))) > 1:
            raise UserError("nothing says how long it is, and its bit rate varies; write it anew")
        while len(opened.read(BLOCK, dtype="float32")):  # whatever there is must decode
            pass
        opened.seek(0)
        return seconds
    last = min(frames, math.ceil(END * rate))
    try:
        opened.seek(frames - last)
        there = not frames or len(opened.read(last)) > 0
    except (soundfile.SoundFileError, RuntimeError):
        there = False
    if not there:
        raise UserError(f"it is cut off: the end of the {seconds:.2f} seconds is missing")
    opened.seek(0)
    return seconds


def read_duration(source: bytes | BinaryIO) -> float:
    """Returns the seconds of a file; reads only its header and its end."""
    with readable(), soundfile.SoundFile(source) as opened:
        return duration_of(opened, source)


def examine(source: bytes | BinaryIO) -> tuple[float, int]:
    """Decodes all of a file, a part at a time, and returns its seconds and sample rate."""
    frames = 0
    with readable(), soundfile.SoundFile(source) as opened:
        rate, seconds = opened.samplerate, duration_of(opened, source)
        promised = header_promise(opened, source)[0]
        while len(part := opened.read(BLOCK, dtype="float32", always_2d=True)):
            frames += len(part)
            check_samples(part)
    check_samples(np.zeros((frames, 0), dtype=np.float32))
    if promised and frames < (seconds - END) * rate:
        raise UserError(f"it is cut off: {frames / rate:.2f} of {seconds:.2f} seconds are there")
    return frames / rate, rate


def resample(wave: np.ndarray, native: int, rate: int) -> np.ndarray:
    """[S] samples at one rate -> [S'] at another, at least one."""
    with readable():
        resampled = wave if native == rate else soxr.resample(wave, native, rate)
    return resampled if len(resampled) else np.zeros(1, dtype=np.float32)


def load_audio(
    source: bytes | BinaryIO,
    max_seconds: float,
    rate: int = SAMPLE_RATE,
    draw: Callable[[int], int] | None = None,
) -> np.ndarray:
    """Reads a file as `read_wave` does and resamples it to `rate`: [S]."""
    with readable(), soundfile.SoundFile(source) as opened:
        native, wave = opened.samplerate, read_wave(opened, max_seconds, draw)
    return resample(wave, native, rate)


def load_first(source: bytes | BinaryIO, max_seconds: float, rate: int) -> tuple[float, np.ndarray]:
    """Returns the seconds of a file as `read_duration` does, and its beginning at `rate`: [S]."""
    with readable(), soundfile.SoundFile(source) as opened:
        seconds = duration_of(opened, source)
        native, wave = opened.samplerate, read_wave(opened, max_seconds)
    return seconds, resample(wave, native, rate)


@cache
def mel_filters() -> Tensor:
    """Returns [N_FFT / 2 + 1, N_MELS], triangles of height 1, even on the HTK mel scale."""
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


class LogMel:
    """The front end of the built-in encoder and of CED; float16, 12.8 KB per second of audio."""

    sample_rate, seconds = SAMPLE_RATE, math.inf
    key = f"log-mel {SAMPLE_RATE} {N_FFT} {HOP} {N_MELS} {F_MAX} {TOP_DB}"

    def __call__(self, wave: np.ndarray) -> Tensor:
        return log_mel(torch.from_numpy(wave)).half()
