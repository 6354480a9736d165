"""How a synthetic scene is told, in the languages of `phrases.toml`: the paper's eight."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .config import tomllib

CAPTIONS = 5  # of a clip in each language, all different
CODES = ("eng", "fra", "deu", "spa", "nld", "cat", "jpn", "zho")  # ISO 639-3


@cache
def words_of(language: str) -> dict[str, Any]:
    """Reads the table of a language."""
    text = Path(__file__).with_name("phrases.toml").read_text(encoding="utf-8")
    words: dict[str, Any] = tomllib.loads(text)[language]
    return words


def noun_phrase(forms: list[str], count: int, words: dict[str, Any]) -> str:
    """Returns the words for `count` of an event, whose forms are (one, many)."""
    if count == 1:
        return forms[0]
    number, feminine = words["numbers"][count - 2], words.get("feminine", words["numbers"])
    return forms[1].format(n=number, f=feminine[count - 2])


def describe(
    phases: tuple[tuple[str, int], ...],
    background: str,
    rng: np.random.Generator,
    language: str = "eng",
) -> list[str]:
    """Returns CAPTIONS different sentences about phases of (event, count) in time order."""
    words, sentences = words_of(language), []
    for template, over in zip(words["templates"][str(len(phases))], words["over"], strict=True):
        nouns = []
        for kind, count in phases:
            forms = words["events"][kind]
            nouns.append(noun_phrase(forms[rng.integers(len(forms))], count, words))
        sentence = template.format(*nouns)
        names = words["backgrounds"].get(background)
        if names:
            sentence += over.format(names[rng.integers(len(names))])
        sentences.append(sentence)
    return sentences
