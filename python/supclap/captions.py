"""How manifests are written, and which captions a row or an object of one holds."""

from __future__ import annotations

import re
from typing import Any

from .languages import LANGUAGE, caption_language, language_code
from .tables import clean

FORMATS = """\
    CSV    file_name, caption_1, ... caption_k [, lang]     Clotho; rows of one file are joined
           file_name, caption [, lang]                      one caption a row
           file_name, caption, caption_fr, caption_de_1     several languages
           audiocap_id, youtube_id, start_time, caption     AudioCaps as published
           audio, path, wav or filename for file_name; .tsv: tabs for commas
    JSON   {"data": [{"id" | "audio", "caption" | "caption_1", ..., ["lang"]}]}   WavCaps, ML-CLAP
    JSONL  {"audio": ..., "captions": ["..."] | {"eng": ["..."]} [, "lang": "eng"]}
    Parquet   a row as a line of JSONL; its audio a name, or {"bytes", "path"} (datasets' Audio)
    tar    KEY.flac beside KEY.json (of JSONL's keys, or "text") or KEY.txt; {000..012} in a name
           stands for all of them

Captions are in `caption`, `caption_2`, `caption_fr`, `caption_fr_2` and `captions`;
`hard_negative`, `hard_negative_2` and `hard_negatives` hold captions that are wrong for the clip;
every other column is unused. A clip may have any number of captions. A file is looked for in the
manifest's own folder, then in `audio/` beside it: under its name as written, then under one that
looks the same.
"""
LANGUAGE_KEYS = ("lang", "language")
WRONG = re.compile(r"hard_negatives?(_\d+)?")  # captions that are wrong for the clip


def holds_captions(column: str, texts: list[str | None]) -> bool:
    """Whether a column holds captions: by its name, and numbers are in no language."""
    language = caption_language(column)
    if not language or not texts:
        return language is not None
    return any(is_text(text) for text in texts)


def is_text(value: Any) -> bool:
    """Whether a value has letters, and is not how tables say that there is none."""
    text = value.strip().lower() if isinstance(value, str) else ""
    return text not in ("nan", "none", "null") and any(letter.isalpha() for letter in text)


def captions_in(row: dict[Any, Any], columns: list[str]) -> list[tuple[str, str]]:
    """Returns captions and languages of one row; a ValueError says what is wrong."""
    code = clean(row.get("lang") or row.get("language"))
    language = language_code(code) if code else LANGUAGE
    # A wide table has holes: where a clip has fewer captions, and where a translation is missing.
    plain = [name for name in columns if not caption_language(name)]
    if plain and not any(clean(row[name]) for name in plain):
        raise ValueError(f"{plain[0]} is empty")
    held = [
        (clean(row[name]), caption_language(name) or language)
        for name in columns
        if (is_text(row[name]) if caption_language(name) else clean(row[name]))
    ]
    if not held:
        raise ValueError("no caption")
    return held


def captions_of(entry: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns captions and languages of one JSON object, and the keys that hold them; a ValueError
    says what is wrong."""
    columns = [key for key in entry if caption_language(key) is not None]
    columns = [key for key in columns if not caption_language(key) or holds_text(entry[key])]
    filled = [key for key in columns if caption_language(key) or entry[key] not in (None, "")]
    columns = filled if any(not caption_language(key) for key in filled) else columns
    columns = ["captions"] if entry.get("captions") or not columns else columns
    columns = [key for key in columns if key in entry] or [key for key in ("text",) if key in entry]
    if not columns:
        raise ValueError("no caption: it needs captions, caption or caption_1")
    pairs: list[tuple[Any, Any]] = []
    for key in columns:
        value, numbered = entry[key], f"source_lang_{key.removeprefix('caption_')}"
        by_language = [(caption_language(key) or entry.get(numbered), value)]
        if isinstance(value, dict):
            by_language = [(code, texts) for code, texts in value.items() if texts is not None]
        pairs += [(text, code) for code, texts in by_language for text in as_list(texts)]
    shared = next((entry[key] for key in LANGUAGE_KEYS if entry.get(key)), LANGUAGE)
    silent = sum(code is None for _, code in pairs)
    if isinstance(shared, list) and len(shared) != silent:
        raise ValueError(f"{silent} captions and {len(shared)} languages")
    others = iter(shared if isinstance(shared, list) else [shared] * silent)
    pairs = [(text, next(others) if code is None else code) for text, code in pairs]
    if not pairs:
        raise ValueError("no caption: it needs captions, caption or caption_1")
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise ValueError("captions must be a string, a list of them, or lists by language")
    if not all(clean(text) for text, _ in pairs):
        raise ValueError("a caption is empty")
    return [(clean(text), language_code(code)) for text, code in pairs], columns


def holds_text(value: Any) -> bool:
    """Whether a value, or one of a list, is text; what is neither is an error elsewhere."""
    return isinstance(value, dict) or any(map(is_text, as_list(value)))


def wrong_in(entry: dict[Any, Any]) -> tuple[str, ...]:
    """Returns the captions that are wrong for a clip; a ValueError says what is wrong with them."""
    named = [key for key in entry if isinstance(key, str) and WRONG.fullmatch(key)]
    values = [x for key in named for x in as_list(entry[key]) if x is not None and x != ""]
    if not all(isinstance(x, str) for x in values):
        raise ValueError("hard_negatives must be a string, or a list of them")
    return tuple(clean(x) for x in values if is_text(x))


def as_list(value: Any) -> list[Any]:
    """Returns a list as it is, and a value as the only one of a list."""
    return value if isinstance(value, list) else [value]
