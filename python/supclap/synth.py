"""A corpus of synthetic scenes: WAV files whose captions say what happens, when and how often.

A scene is one to three phases in time, each one kind of event repeated, over a background. Scenes
come in families of hard negatives: the same events in another order, or in another number.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile

from .config import check_seed
from .errors import UserError
from .files import write_text
from .languages import LANGUAGE
from .phrases import CAPTIONS, CODES, describe, words_of
from .progress import Bar

RATE = 16_000
SPLITS = {"train": 0.7, "val": 0.1, "test": 0.2}
LONGEST = 4.0  # seconds of events in one clip

Rng = np.random.Generator
Wave = np.ndarray  # [S] float64


def seconds(duration: float) -> Wave:
    """Returns the time axis of a sound: [S]."""
    return np.arange(int(duration * RATE)) / RATE


def sweep(frequency: Wave) -> Wave:
    """Returns a sine that has this frequency at each sample."""
    return np.sin(2 * np.pi * np.cumsum(frequency) / RATE)


def faded(wave: Wave, edge: float = 0.01) -> Wave:
    """Raises and lowers the ends over `edge` seconds, so that no click is added."""
    ramp = np.minimum(1.0, np.arange(1, len(wave) + 1) / (edge * RATE))
    return wave * ramp * ramp[::-1]


def coloured(rng: Rng, length: int, slope: float) -> Wave:
    """Returns noise whose amplitude falls as frequency ** -slope, with unit deviation."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** -slope
    wave = np.fft.irfft(spectrum, length)
    return wave / wave.std()


def click(rng: Rng) -> Wave:
    t = seconds(0.02)
    return rng.standard_normal(len(t)) * np.exp(-t / 0.003)


def knock(rng: Rng) -> Wave:
    t = seconds(0.15)
    return np.sin(2 * np.pi * rng.uniform(150, 200) * t) * np.exp(-t / 0.04)


def beep(rng: Rng) -> Wave:
    t = seconds(0.14)
    return 0.6 * faded(np.sin(2 * np.pi * rng.uniform(1400, 1800) * t))


def noise_burst(rng: Rng) -> Wave:
    return 0.35 * faded(rng.standard_normal(int(0.25 * RATE)))


def rising_chirp(rng: Rng) -> Wave:
    t = seconds(rng.uniform(0.5, 0.7))
    low, high = rng.uniform(300, 500), rng.uniform(2500, 3500)
    return 0.6 * faded(sweep(low * (high / low) ** (t / t[-1])))


def falling_chirp(rng: Rng) -> Wave:
    return rising_chirp(rng)[::-1]


def steady_tone(rng: Rng) -> Wave:
    t = seconds(rng.uniform(0.6, 0.8))
    return 0.5 * faded(np.sin(2 * np.pi * rng.uniform(500, 700) * t))


def siren(rng: Rng) -> Wave:
    t = seconds(1.0)
    return 0.5 * faded(sweep(900 + 350 * np.sin(2 * np.pi * rng.uniform(2.5, 3.5) * t)))


def bell(rng: Rng) -> Wave:
    t = seconds(0.8)
    base = rng.uniform(750, 950)
    partials = ((1.0, 0.30), (2.0, 0.20), (2.76, 0.15), (5.4, 0.08))
    rings = [np.sin(2 * np.pi * base * r * t) * np.exp(-t / d) for r, d in partials]
    return 0.4 * np.sum(rings, axis=0)


def buzz(rng: Rng) -> Wave:
    t = seconds(rng.uniform(0.4, 0.5))
    return 0.4 * faded(np.sign(np.sin(2 * np.pi * rng.uniform(100, 130) * t)))


def hum(rng: Rng, length: int) -> Wave:
    t = np.arange(length) / RATE
    base = rng.uniform(55, 65)
    return np.sum([np.sin(2 * np.pi * base * k * t) / k for k in (1, 2, 3, 4)], axis=0)


def rain(rng: Rng, length: int) -> Wave:
    drops = np.zeros(length)
    hits = rng.random(length) < 400 / RATE
    drops[hits] = rng.exponential(6.0, hits.sum())
    return np.convolve(drops, rng.standard_normal(24), "same") + 0.5 * coloured(rng, length, -0.3)


def engine(rng: Rng, length: int) -> Wave:
    t = np.arange(length) / RATE
    firing = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(16, 22) * t)
    return firing**4 * coloured(rng, length, 0.7)


def wind(rng: Rng, length: int) -> Wave:
    t = np.arange(length) / RATE
    gusts = 1 + 0.6 * np.sin(2 * np.pi * (rng.uniform(0.3, 0.6) * t + rng.random()))
    return gusts * coloured(rng, length, 0.5)


@dataclass(frozen=True)
class Event:
    """How a kind of event sounds, and how often it may repeat."""

    sound: Callable[[Rng], Wave]
    most: int


EVENTS = {
    "click": Event(click, 4),
    "knock": Event(knock, 4),
    "beep": Event(beep, 4),
    "noise": Event(noise_burst, 4),
    "rising": Event(rising_chirp, 2),
    "falling": Event(falling_chirp, 2),
    "tone": Event(steady_tone, 2),
    "siren": Event(siren, 2),
    "bell": Event(bell, 3),
    "buzz": Event(buzz, 3),
}
BACKGROUNDS: dict[str, Callable[[Rng, int], Wave] | None] = {
    "none": None,
    "hum": hum,
    "rain": rain,
    "engine": engine,
    "wind": wind,
}
SHORT = ("click", "knock", "beep", "noise")


@dataclass(frozen=True)
class Scene:
    """What happens in a clip: phases of (event, count) in time order, over a background."""

    phases: tuple[tuple[str, int], ...]
    background: str


def duration(scene: Scene) -> float:
    """Returns an upper bound of the seconds a scene's events take."""
    return sum(n * (0.3 if name in SHORT else 1.05) + 0.25 for name, n in scene.phases)


def draw_scene(rng: Rng) -> Scene:
    """Returns a random scene that fits; neighbouring phases are of different kinds."""
    while True:
        kinds = rng.choice(list(EVENTS), rng.choice((1, 2, 3), p=(0.2, 0.6, 0.2)), replace=False)
        phases = tuple((str(k), int(rng.integers(1, EVENTS[k].most + 1))) for k in kinds)
        scene = Scene(phases, str(rng.choice(list(BACKGROUNDS))))
        if duration(scene) <= LONGEST:
            return scene


def draw_family(rng: Rng) -> Iterator[tuple[str, Scene]]:
    """Yields a scene and its hard negatives: ("base" | "order" | "count", scene)."""
    scene = draw_scene(rng)
    yield "base", scene
    if len(scene.phases) > 1:
        yield "order", replace(scene, phases=scene.phases[::-1])
    where = int(rng.integers(len(scene.phases)))
    kind, count = scene.phases[where]
    for other in rng.permutation(np.arange(1, EVENTS[kind].most + 1)).tolist():
        phases = scene.phases[:where] + ((kind, other),) + scene.phases[where + 1 :]
        changed = replace(scene, phases=phases)
        if other != count and duration(changed) <= LONGEST:
            yield "count", changed
            return


def compose(scene: Scene, rng: Rng) -> tuple[Wave, list[list[float]]]:
    """Returns a waveform within [-1, 1] and the onsets, in seconds, of each phase's events."""
    wave = np.zeros(int((LONGEST + 1.5) * RATE))
    now = rng.uniform(0.1, 0.3)
    onsets: list[list[float]] = []
    for kind, count in scene.phases:
        onsets.append([])
        for _ in range(count):
            start, sound = int(now * RATE), EVENTS[kind].sound(rng)
            wave[start : start + len(sound)] += sound
            onsets[-1].append(round(start / RATE, 4))
            now += max(len(sound) / RATE + 0.06, 0.25)
        now += rng.uniform(0.1, 0.25)
    wave = wave[: int((now + rng.uniform(0.0, 0.2)) * RATE)]
    texture = BACKGROUNDS[scene.background]
    if texture is not None:
        floor = texture(rng, len(wave))
        wave += 0.04 * floor / floor.std()
    return wave * (rng.uniform(0.5, 0.9) / np.abs(wave).max()), onsets


def draw_corpus(clips: int, rng: Rng) -> Iterator[tuple[str, int, str, Scene]]:
    """Yields `clips` scenes, no two the same: (split, family, variant, scene), split by split."""
    sizes = {split: max(1, round(clips * share)) for split, share in SPLITS.items()}
    sizes["train"] = clips - sizes["val"] - sizes["test"]
    seen: set[Scene] = set()
    family = 0
    for split, size in sizes.items():
        left = size
        while left:
            for variant, scene in draw_family(rng):
                if left and scene not in seen:
                    seen.add(scene)
                    left -= 1
                    yield split, family, variant, scene
            family += 1


def write_wave(path: Path, wave: Wave) -> None:
    try:
        soundfile.write(path, wave, RATE, subtype="PCM_16")
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def write_csv(path: Path, rows: list[list[str]]) -> None:
    stream = io.StringIO()
    csv.writer(stream).writerows(rows)
    write_text(path, stream.getvalue())


def elsewhere(wave: Wave, rng: Rng) -> Wave:
    """The same scene in another place: played at 0.8 of its speed, in a room, over louder noise."""
    points = np.arange(0, len(wave) - 1, 0.8)
    wave = np.interp(points, np.arange(len(wave)), wave)
    t = seconds(0.3)
    echo = rng.standard_normal(len(t)) * np.exp(-t / 0.06) * 0.08
    echo[0] = 1.0
    length = len(wave) + len(echo) - 1
    wave = np.fft.irfft(np.fft.rfft(wave, length) * np.fft.rfft(echo, length), length)
    wave += 0.02 * coloured(rng, length, 0.5)
    return wave * (0.7 / np.abs(wave).max())


def synthesise(
    out: Path,
    clips: int = 1000,
    seed: int = 0,
    overwrite: bool = False,
    languages: tuple[str, ...] = ("eng",),
    captions: int = CAPTIONS,
    shifted: bool = False,
) -> None:
    """Writes `out/audio/*.wav`, `out/scenes.jsonl` (the truth) and `out/{train,val,test}.csv`, with
    several languages `.jsonl`. `shifted`: other acoustics."""
    check_seed(seed)
    if not len(SPLITS) <= clips <= 10_000:
        raise UserError(f"--clips must be between {len(SPLITS)} and 10000, got {clips}")
    unknown = [language for language in languages if language not in CODES]
    if unknown:
        raise UserError(f"--languages: {unknown[0]!r} is none of {', '.join(CODES)}")
    if not 1 <= captions <= CAPTIONS:
        raise UserError(f"--captions must be between 1 and {CAPTIONS}, got {captions}")
    if (out / "scenes.jsonl").exists() and not overwrite:
        raise UserError(f"{out} already holds a corpus; name another folder or add --overwrite")
    (out / "audio").mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("*.csv"), *out.glob("*.jsonl"), *(out / "audio").glob("scene_*.wav")]:
        old.unlink()  # of an earlier corpus

    rng = np.random.default_rng(seed)
    rows: dict[str, list[tuple[str, dict[str, list[str]]]]] = {split: [] for split in SPLITS}
    truth = []
    scenes = list(draw_corpus(clips, rng))
    bar = Bar(scenes, desc="synthesising")
    for number, (split, family, variant, scene) in enumerate(bar):
        name = f"scene_{number:05d}.wav"
        wave, onsets = compose(scene, rng)
        if shifted:
            wave = elsewhere(wave, rng)
            onsets = [[round(when / 0.8, 4) for when in phase] for phase in onsets]
        write_wave(out / "audio" / name, wave)
        texts_of = {code: describe(scene.phases, scene.background, rng, code) for code in languages}
        if captions < CAPTIONS:
            numbers = sorted(rng.permutation(CAPTIONS)[:captions].tolist())
            texts_of = {code: [texts[n] for n in numbers] for code, texts in texts_of.items()}
        rows[split].append((name, texts_of))
        phases = [
            {"event": kind, "count": count, "onsets": when}
            for (kind, count), when in zip(scene.phases, onsets, strict=True)
        ]
        entry = {"file_name": name, "split": split, "family": family, "variant": variant}
        truth.append(entry | {"background": scene.background, "phases": phases})

    write_text(out / "scenes.jsonl", "".join(json.dumps(entry) + "\n" for entry in truth))
    for split, clips_of in rows.items():
        if len(languages) > 1:
            lines = [{"audio": name, "captions": texts_of} for name, texts_of in clips_of]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text(out / f"{split}.jsonl", text)
            continue
        extra = [] if languages == (LANGUAGE,) else ["lang"]
        table = [["file_name", *(f"caption_{n + 1}" for n in range(captions)), *extra]]
        for name, texts_of in clips_of:
            table.append([name, *texts_of[languages[0]], *languages[: len(extra)]])
        write_csv(out / f"{split}.csv", table)


def synthesise_events(out: Path, each: int, seed: int = 7) -> None:
    """Writes single events for zero-shot classification, `each` of every kind, and their labels."""
    (out / "audio").mkdir(parents=True, exist_ok=True)
    rng, table = np.random.default_rng(seed), [["file_name", "label"]]
    for kind in EVENTS:
        for number in range(each):
            background = str(rng.choice(list(BACKGROUNDS)))
            wave, _ = compose(Scene(((kind, 1),), background), rng)
            name = f"{kind}_{number:02d}.wav"
            write_wave(out / "audio" / name, wave)
            table.append([name, words_of(LANGUAGE)["events"][kind][0][0]])
    write_csv(out / "labels.csv", table)
