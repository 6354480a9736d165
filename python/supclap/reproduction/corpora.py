"""The corpora of a reproduction: synthetic ones, or real recordings."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ..corpus import load_corpus
from ..errors import UserError
from ..files import write_text
from ..leaks import leaks
from ..logs import read_lines
from ..manifest import READERS, Clip, read_manifest
from ..synth import synthesise, synthesise_events
from .presets import Preset

SIDES = ("here", "there")  # the corpus, and one with other acoustics
SPLITS = ("train", "val", "test")
EVENTS = Path("events/labels.csv")


def make_corpora(out: Path, preset: Preset) -> None:
    """Makes `here`, `there` with other acoustics, `here/noise*`, and single events with labels."""
    shared: dict[str, Any] = {"languages": preset.languages, "captions": preset.captions}
    for seed, name in enumerate(SIDES):
        if not (out / name / "test.jsonl").exists():
            synthesise(out / name, preset.clips, seed, True, shifted=name == "there", **shared)
    for noise in preset.noises:
        target = out / f"here/noise{noise}.jsonl"
        if not target.exists():
            write_text(target, with_noise(target.with_stem("train"), noise / 100))
    if not (out / EVENTS).exists():
        synthesise_events(out / EVENTS.parent, 2 if preset.clips < 100 else 20)
    fill_cache(out, preset)


def fill_cache(out: Path, preset: Preset) -> None:
    """Computes the features once, before the runs share them."""
    for side in SIDES:
        for split in SPLITS:
            path = out / side / f"{split}.jsonl"
            if path.exists():
                load_corpus(path, preset.model.max_seconds, cache=str(out / "features"))


def with_noise(manifest: Path, share: float, seed: int = 0) -> str:
    """Returns a JSONL manifest in which that share of the clips has the captions of others."""
    lines = read_lines(manifest)
    clips = np.random.default_rng(seed).permutation(len(lines))[: round(share * len(lines))]
    captions = [lines[n]["captions"] for n in np.roll(clips, 1)]
    for n, others in zip(clips, captions, strict=True):
        lines[n] = lines[n] | {"captions": others}
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def take_recordings(folder: Path, out: Path, preset: Preset) -> None:
    """Takes `train`, `val` and `test` of a folder of manifests as `here`. Raises an error where a
    held-out clip or sentence is trained on."""
    clips = {split: read_manifest(manifest_of(folder, split)) for split in SPLITS}
    for split in SPLITS[1:]:
        found = leaks(clips["train"], clips[split])
        if found:
            raise UserError(
                f"{folder}: {len(found)} clips of {split} are known from train, such as\n  "
                + "\n  ".join(found[:5])
            )
    (out / "here").mkdir(parents=True, exist_ok=True)
    for split, of_split in clips.items():
        write_text(out / "here" / f"{split}.jsonl", "".join(map(line_of, of_split)))
    fill_cache(out, preset)


def manifest_of(folder: Path, split: str) -> Path:
    found = [path for suffix in READERS if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) != 1:
        raise UserError(
            f"--real {folder} needs one manifest {split}, as one of {', '.join(READERS)}; "
            f"it has {len(found)}"
        )
    return found[0]


def line_of(clip: Clip) -> str:
    """A clip as a line of JSONL, wherever it is."""
    if clip.span is not None or clip.cell is not None:
        raise UserError(f"--real takes files, not clips inside of one: {clip}")
    captions = defaultdict(list)
    for caption, language in zip(clip.captions, clip.languages, strict=True):
        captions[language].append(caption)
    line = {"audio": str(clip.path.absolute()), "captions": captions}
    return json.dumps(line, ensure_ascii=False) + "\n"
