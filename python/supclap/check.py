"""`supclap check`: what a manifest holds, and everything that is wrong with it."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .audio import examine, open_audio
from .errors import UserError
from .manifest import Clip, problems_of, readings


def heard(clip: Clip) -> tuple[float, int] | str:
    """Seconds and sample rate, or what is wrong with the file; all of it is decoded."""
    try:
        return examine(open_audio(clip))
    except UserError as error:
        return str(error)


def check(manifest: Path) -> tuple[list[str], list[str]]:
    """Lines that describe the manifest, and its problems, each with its line."""
    found = list(readings(manifest))
    clips = [clip for reading in found for clip in reading.clips.values()]
    problems = [problem for reading in found for problem in problems_of(reading)]
    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(heard, clips))
    seconds, rates = [], Counter[int]()
    for clip, header in zip(clips, headers, strict=True):
        place = f"manifest {manifest}, {clip.place} ({clip.name})"
        if isinstance(header, str):
            problems.append(f"{place}: {header}")
        else:
            seconds.append(header[0])
            rates[header[1]] += 1
        pairs = Counter(
            zip(clip.captions, clip.languages, strict=True)
        )  # languages share sentences
        problems += [
            f"{place}: the caption {caption!r} is there {count} times"
            for (caption, _), count in pairs.items()
            if count > 1
        ]
    counts = [len(clip.captions) for clip in clips]
    languages = Counter(language for clip in clips for language in clip.languages)
    said = [f"{len(clips)} clips, {sum(counts)} captions"]
    unused = dict.fromkeys(column for reading in found for column in reading.unused)
    if unused:
        said.append(f"unused columns: {', '.join(unused)}")
    if clips:
        said.append(f"captions of a clip: {min(counts)} to {max(counts)}")
        said.append("languages: " + ", ".join(f"{k} {n}" for k, n in sorted(languages.items())))
    if seconds:
        low, middle, high = np.quantile(seconds, (0, 0.5, 1))
        said.append(
            f"seconds: {low:.2f} to {high:.2f}, median {middle:.2f}, "
            f"{sum(seconds) / 3600:.2f} hours in all"
        )
        said.append("sample rates: " + ", ".join(f"{k} Hz {n}" for k, n in sorted(rates.items())))
    return said, problems
