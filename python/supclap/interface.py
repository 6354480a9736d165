"""A trained run in Python: `supclap.load(run)`."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from .audio import load_first, mono, open_audio, resample
from .corpus import naming
from .embeddings import DEFAULTS, EmbedOptions, embed_clips, embed_features, embed_text
from .errors import UserError
from .languages import LANGUAGE, language_code
from .manifest import SHOWN, Clip
from .model import load_model
from .ranks import choose_device

AudioInput = str | Path | np.ndarray | Tensor
"""The name of a file, or samples [S] or [S, channels] between -1 and 1."""


class Embedder:
    """The model of a run: unit vectors of sounds and of sentences, whose inner products are their
    similarity.

    Args:
        run: the folder that `supclap train` wrote, or `supclap.train` returned.
        options: the device, how clips are read and how many are encoded at once.

    Raises:
        UserError: the folder is no run, or its files cannot be read.
    """

    def __init__(self, run: str | Path, options: EmbedOptions = DEFAULTS) -> None:
        self.run, self.options = Path(run), options
        self.model = load_model(self.run).to(options.device)

    @property
    def width(self) -> int:
        """D, the dimensions of the shared space."""
        return self.model.width

    def embed_audio(
        self, audio: AudioInput | Sequence[AudioInput], sample_rate: int | None = None
    ) -> Tensor:
        """Returns the unit vectors of sounds: [N, D] float32, on the CPU.

        Args:
            audio: files, or arrays of samples, or one of them (N = 1); of a longer sound only the
                beginning is heard, as long as the model was trained on.
            sample_rate: of arrays, in Hz.

        Raises:
            UserError: a file that cannot be read, samples that are no numbers. TypeError,
            ValueError: arrays without their sample rate, or of another shape.
        """
        single = isinstance(audio, str | Path | np.ndarray | Tensor)
        sounds: list[AudioInput] = [audio] if single else list(audio)  # type: ignore[list-item,arg-type]
        if all(isinstance(sound, str | Path) for sound in sounds):
            paths = [Path(sound) for sound in sounds]  # type: ignore[arg-type]
            clips = [Clip(str(path), path, ()) for path in paths]
            if not clips:
                return torch.empty(0, self.width)
            missing = [str(path) for path in paths if not os.path.exists(path)]
            if missing:
                raise UserError(f"no such file: {', '.join(missing[:SHOWN])}")
            options = replace(self.options, skip_bad_audio=False)  # a row for each
            return embed_clips(self.model, clips, Path("the list"), options)[0]
        features = [self.features(sound, sample_rate) for sound in sounds]
        return embed_features(self.model, features, self.options.batch_size)

    def features(self, sound: AudioInput | BinaryIO, sample_rate: int | None = None) -> Tensor:
        """Returns what the audio encoder takes, [F, M]: of a file, or of samples and their rate."""
        front_end, seconds = self.model.audio.encoder.front_end, self.model.seconds
        if isinstance(sound, str | Path):
            clip = Clip(str(sound), Path(sound), ())
            with naming(clip):
                wave = load_first(open_audio(clip), seconds, front_end.sample_rate)[1]
        elif isinstance(sound, io.IOBase):
            wave = load_first(cast(BinaryIO, sound), seconds, front_end.sample_rate)[1]
        elif sample_rate is None:
            raise TypeError("arrays of samples need their sample_rate, in Hz")
        else:
            wave = samples_of(sound)
            if seconds * sample_rate < len(wave):
                wave = wave[: math.ceil(seconds * sample_rate)]
            wave = resample(wave, sample_rate, front_end.sample_rate)
        features: Tensor = front_end(wave)
        return features

    def embed_text(self, captions: str | Iterable[str], lang: str = LANGUAGE) -> Tensor:
        """Returns the unit vectors of sentences: [M, D] float32, on the CPU.

        Args:
            captions: sentences, or one (M = 1).
            lang: their language, such as "eng", "en" or "English"; encoders that know no languages
                take no notice.

        Raises:
            TypeError: what is no string. ValueError: no such language. UserError: one that the
            encoder does not have.
        """
        sentences = [captions] if isinstance(captions, str) else list(captions)
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise TypeError(f"captions must be strings, got {sentences[:3]!r}")
        if not all(sentence.strip() for sentence in sentences):
            raise UserError("a sentence is empty")
        if not sentences:
            return torch.empty(0, self.width)
        languages = [language_code(lang)] * len(sentences)
        return embed_text(self.model, sentences, languages, self.options.batch_size)

    def similarity(
        self,
        text: str | Iterable[str] | Tensor,
        audio: AudioInput | Sequence[AudioInput],
        sample_rate: int | None = None,
        lang: str = LANGUAGE,
    ) -> Tensor:
        """Returns the cosine of every sentence with every sound: [M, N].

        Args:
            text: unit vectors [M, D], or what `embed_text` takes.
            audio: unit vectors [N, D] (without a sample rate), or what `embed_audio` takes.
            sample_rate, lang: of samples, and of sentences.
        """
        texts = text if isinstance(text, Tensor) else self.embed_text(text, lang)
        if isinstance(audio, Tensor) and sample_rate is None:
            return texts @ audio.T
        return texts @ self.embed_audio(audio, sample_rate).T


def samples_of(sound: Any) -> np.ndarray:
    """Mono float32 [S] of samples [S] or [S, channels], floats or integers of full scale."""
    wave = np.asarray(sound.detach().cpu() if isinstance(sound, Tensor) else sound)
    if wave.ndim not in (1, 2) or (wave.ndim == 2 and wave.shape[0] < wave.shape[1]):
        raise ValueError(f"samples are [S] or [S, channels], got an array of shape {wave.shape}")
    if np.issubdtype(wave.dtype, np.integer):
        low, high = np.iinfo(wave.dtype).min, np.iinfo(wave.dtype).max
        wave = (wave - (low + high + 1) / 2) / ((high - low + 1) / 2)
    wave = wave.astype(np.float32)
    return mono(wave[:, None] if wave.ndim == 1 else wave)


def load(run: str | Path, device: str = "auto") -> Embedder:
    """Returns the model of a run, ready to embed.

        model = supclap.load("run")
        model.similarity(["a dog barks", "rain"], ["a.wav", "b.flac"])  # cosines, [2, 2]

    `device`: auto (a GPU if there is one), cpu or cuda. Raises UserError where there is no run.
    """
    return Embedder(run, replace(DEFAULTS, device=choose_device(device)))
