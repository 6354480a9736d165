"""`supclap check`: what a manifest holds, and everything that is wrong with it."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .audio import examine, open_audio
from .errors import UserError
from .labels import is_labelled, labelled_clips, read_clips_of
from .leaks import leaks
from .manifest import Clip, scan_manifest
from .progress import Bar


def examine_clip(clip: Clip) -> tuple[float, int] | str:
    """Decodes all of a clip and returns its seconds and sample rate, or what is wrong with it."""
    try:
        return examine(open_audio(clip))
    except UserError as error:
        return str(error)


def check_splits(manifests: list[Path]) -> list[str]:
    """Returns a line for each clip of a later manifest that the first one knows: by its sound, or
    by its sentence."""
    training, *others = (read_clips_of(manifest)[0] for manifest in manifests)
    return [
        f"{manifest}: {line}"
        for manifest, clips in zip(manifests[1:], others, strict=True)
        for line in leaks(training, clips)
    ]


def check(manifest: Path, workers: int | None = None) -> tuple[list[str], list[str]]:
    """Returns lines that describe the manifest, and its problems, each with its line. `workers`:
    threads that decode; None: as many as there are cores."""
    labels: list[str] = []
    if is_labelled(manifest):
        clips, labels, _ = labelled_clips(manifest)
        problems, unused = list[str](), list[str]()
    else:
        clips, problems, unused = scan_manifest(manifest)
    with ThreadPoolExecutor(workers) as pool:
        items = pool.map(examine_clip, clips)
        headers = list(Bar(items, f"decoding {manifest.name}", len(clips)))
    seconds, rates = [], Counter[int]()
    for clip, header in zip(clips, headers, strict=True):
        place = f"manifest {manifest}, {clip.place} ({clip.name})"
        if isinstance(header, str):
            problems.append(f"{place}: {header}")
        else:
            seconds.append(header[0])
            rates[header[1]] += 1
        # Languages share sentences.
        pairs = Counter(zip(clip.captions, clip.languages, strict=True))
        problems += [
            f"{place}: the caption {caption!r} is there {count} times"
            for (caption, _), count in pairs.items()
            if count > 1
        ]
    counts = [len(clip.captions) for clip in clips]
    languages = Counter(language for clip in clips for language in clip.languages)
    lines = [f"{len(clips)} clips, {sum(counts)} captions"]
    if unused:
        lines.append(f"unused columns: {', '.join(unused)}")
    if labels:
        counts = sorted(Counter(labels).values())
        lines = [f"{len(clips)} clips, {len(counts)} labels"]
        lines.append(f"clips of a label: {counts[0]} to {counts[-1]}")
    elif clips:
        lines.append(f"captions of a clip: {min(counts)} to {max(counts)}")
        wrong = sum(len(clip.wrong) for clip in clips)
        lines += [f"hard negatives: {wrong}"] * bool(wrong)
        lines.append("languages: " + ", ".join(f"{k} {n}" for k, n in sorted(languages.items())))
    if seconds:
        low, middle, high = np.quantile(seconds, (0, 0.5, 1))
        lines.append(
            f"seconds: {low:.2f} to {high:.2f}, median {middle:.2f}, "
            f"{sum(seconds) / 3600:.2f} hours in all"
        )
        lines.append("sample rates: " + ", ".join(f"{k} Hz {n}" for k, n in sorted(rates.items())))
    return lines, problems
