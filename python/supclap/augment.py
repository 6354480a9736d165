"""What training changes of a pair, each time otherwise: loudness, a second sound over the first,
masks over the features, words left out. Draws are the epoch's (batches.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

WIDEST = 8  # a mask hides at most one part in so many of the frames, or of the bins
LEVEL = 5.0  # dB by which a second sound may be louder or softer than the first
LOUDEST = 30.0  # dB by which it is amplified for that, at most: silence is noise


@dataclass(frozen=True)
class Augmentation:
    """How much is changed: the settings of these names."""

    gain: float = 0.0
    mix: float = 0.0
    spec_augment: int = 0
    caption_dropout: float = 0.0

    @property
    def of_waves(self) -> bool:
        """Whether samples are changed, so that features cannot be kept."""
        return bool(self.gain or self.mix)

    @property
    def of_audio(self) -> bool:
        return self.of_waves or self.spec_augment > 0

    @property
    def of_text(self) -> bool:
        return bool(self.mix or self.caption_dropout)


def louder(wave: np.ndarray, decibels: float) -> np.ndarray:
    """[S] samples, so much louder."""
    return (wave * 10 ** (decibels / 20)).astype(np.float32)


def mixed(wave: np.ndarray, other: np.ndarray, level: float) -> np.ndarray:
    """Adds another sound [S'], `level` dB louder than the first [S]: as long as the longer one."""
    both = np.zeros(max(len(wave), len(other)), dtype=np.float32)
    powers = [np.square(x, dtype=np.float64).mean() for x in (wave, other)]
    decibels = level + 10 * math.log10(powers[0] / powers[1]) if all(powers) else 0.0
    decibels = min(decibels, LOUDEST)
    both[: len(wave)] = wave
    both[: len(other)] += louder(other, decibels)
    return both


def masked(features: Tensor, rng: np.random.Generator, count: int) -> Tensor:
    """Returns features [F, M] with their mean in `count` spans of frames and as many of bins
    (SpecAugment, arXiv 1904.08779). The last frame stays: an encoder may repeat it."""
    features, mean = features.clone(), float(features.float().mean())
    for dim in (0, 1):
        size = features.shape[dim] - (dim == 0)
        for _ in range(count):
            width = int(rng.integers(size // WIDEST + 1))
            features.narrow(dim, int(rng.integers(size - width + 1)), width).fill_(mean)
    return features


def some_words(caption: str, rng: np.random.Generator, share: float) -> str:
    """Leaves each word out with this probability, but one."""
    words = caption.split()
    kept = rng.random(len(words)) >= share
    kept[rng.integers(len(words))] |= not kept.any()
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep)


def both_captions(caption: str, other: str) -> str:
    return f"{caption.rstrip(' .。')}, {other}"
