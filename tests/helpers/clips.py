"""Nine short clips with two captions each, and settings of a model that trains on them quickly."""

import json

import numpy as np
import soundfile
from supclap.config import ModelConfig, TrainConfig
from supclap.step import backward

SMALL = ModelConfig(width=32, heads=2, embed_dim=32)
RATES = (8_000, 16_000, 22_050, 44_100)
WORDS = "dog rain door bird train glass river crowd clock".split()


def near(numbers, expected, within=1e-6):
    """Whether numbers, or lists of them, differ by at most `within`, largest difference counted."""
    numbers, expected = np.asarray(numbers, dtype=float), np.asarray(expected, dtype=float)
    return numbers.shape == expected.shape and np.abs(numbers - expected).max() <= within


def sound(number, rng):
    """A short sound unlike the others, at one of several rates."""
    rate = RATES[number % len(RATES)]
    t = np.arange(int(rate * rng.uniform(0.3, 1.2))) / rate
    if number % 3 == 0:
        pitch = rng.uniform(150, 2_500) * (1 + 0.2 * np.sin(2 * np.pi * rng.uniform(1, 8) * t))
        wave = np.sin(2 * np.pi * np.cumsum(pitch) / rate)
    elif number % 3 == 1:
        kernel = np.sin(np.arange(48) * rng.uniform(0.1, 2.5)) * np.hanning(48)
        wave = np.convolve(rng.standard_normal(len(t)), kernel, "same")
    else:
        wave = np.zeros(len(t))
        for start in rng.integers(0, len(t), number % 5 + 1):
            rest = len(t) - start
            decay = np.exp(-np.arange(rest) / rate / rng.uniform(0.01, 0.1))
            wave[start:] += decay * rng.standard_normal(rest)
    return 0.8 * wave / np.abs(wave).max(), rate


def write_clips(folder):
    """The manifest."""
    rng, rows = np.random.default_rng(1), ["file_name,caption_1,caption_2"]
    for number, word in enumerate(WORDS):
        soundfile.write(folder / f"{word}.wav", *sound(number, rng))
        rows.append(f"{word}.wav,the sound of a {word},we hear a {word} close by")
    (folder / "clips.csv").write_text("\n".join(rows))
    return folder / "clips.csv"


def settings(manifest, out, **changes):
    return TrainConfig(data=manifest, out=out, **{"epochs": 2, "model": SMALL, **changes})


def log_of(run, name="log"):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


class Stop(Exception):  # noqa: N818
    """The process dies here."""


def stopped_at(monkeypatch, step):
    """A loop that dies before the step after `step`."""
    whole, calls = backward, []

    def dies(*args):
        calls.append(1)
        if len(calls) > step:
            raise Stop
        return whole(*args)

    monkeypatch.setattr("supclap.run.backward", dies)
