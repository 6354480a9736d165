"""Do two splits of a corpus share a clip or a sentence? Then what is measured on one is known from
the other."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

from .manifest import Clip
from .parquet import read_cell


def sentence(caption: str) -> str:
    """Returns a caption without what makes no other sentence: case, accents' form, blanks, a final
    stop."""
    folded = unicodedata.normalize("NFC", caption).casefold()
    return " ".join(folded.split()).strip(" .。।")


def content(clip: Clip) -> str:
    """Returns a digest of a clip's bytes."""
    if clip.cell is not None:
        return hashlib.sha256(read_cell(clip.path, clip.cell)).hexdigest()
    with clip.path.open("rb") as stream:
        first, size = clip.span or (0, -1)
        stream.seek(first)
        return hashlib.sha256(stream.read(size)).hexdigest()


def leaks(training: Iterable[Clip], held_out: Iterable[Clip]) -> list[str]:
    """Returns a line for each held-out clip whose sound or whose sentence, in the same language, is
    in the training split."""
    sounds: dict[str, Clip] = {}
    sentences: dict[tuple[str, str], Clip] = {}
    for clip in training:
        sounds.setdefault(content(clip), clip)
        for caption, language in zip(clip.captions, clip.languages, strict=True):
            sentences.setdefault((sentence(caption), language), clip)
    found = []
    for clip in held_out:
        twin = sounds.get(content(clip))
        if twin is not None:
            found.append(f"{clip} sounds like {twin}")
            continue
        for caption, language in zip(clip.captions, clip.languages, strict=True):
            other = sentences.get((sentence(caption), language))
            if other is not None:
                found.append(f"{clip} has the caption {caption!r} of {other}")
                break
    return found
