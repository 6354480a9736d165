"""Which captions a row or an object of a manifest holds; formats.py says how they are written."""

from __future__ import annotations

import re
from typing import Any

from .languages import LANGUAGE, caption_language, language_code
from .tables import clean

LANGUAGE_KEYS = ("lang", "language")
WRONG = re.compile(r"hard_negatives?(_\d+)?")  # captions that are wrong for the clip


def holds_captions(column: str, texts: list[str | None]) -> bool:
    """Whether a column holds captions: by its name, and numbers are in no language."""
    language = caption_language(column)
    if not language or not texts:
        return language is not None
    return any(is_text(text) for text in texts)


def is_missing(value: Any) -> bool:
    """Whether JSON has null or NaN where a value could be."""
    return value is None or value != value


def is_hole(value: Any) -> bool:
    """Whether a cell is empty, or says as tables do that there is nothing."""
    text = value.strip().lower() if isinstance(value, str) else None
    return is_missing(value) or text in ("", "nan", "none", "null")


def is_text(value: Any) -> bool:
    """Whether a value has letters, and is no hole."""
    return isinstance(value, str) and not is_hole(value) and any(map(str.isalpha, value))


def check_any(entry: dict[Any, Any], columns: list[str]) -> None:
    """Raises a ValueError where all columns of captions that name no language are holes: another
    may lack a translation, and have fewer captions, but one there is."""
    plain = [name for name in columns if not caption_language(name)]
    if plain and all(is_hole(entry[name]) for name in plain):
        verb = "is empty" if len(plain) == 1 else "are empty"
        raise ValueError(f"{', '.join(plain)} {verb}")


def captions_in(row: dict[Any, Any], columns: list[str]) -> list[tuple[str, str]]:
    """Returns captions and languages of one row; a ValueError says what is wrong."""
    code = clean(row.get("lang") or row.get("language"))
    language = language_code(code) if code else LANGUAGE
    check_any(row, columns)
    if any(row[name] is None for name in columns if not caption_language(name)):
        raise ValueError("fewer fields than the header has columns")
    captions = [
        (clean(row[name]), caption_language(name) or language)
        for name in columns
        if (is_text(row[name]) if caption_language(name) else not is_hole(row[name]))
    ]
    if not captions:
        raise ValueError("no caption")
    return captions


def captions_of(entry: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns captions and languages of one JSON object, and the keys that hold them; a ValueError
    says what is wrong."""
    columns = [key for key in entry if caption_language(key) is not None]
    columns = [key for key in columns if not caption_language(key) or holds_text(entry[key])]
    columns = ["captions"] if entry.get("captions") or not columns else columns
    columns = [key for key in columns if key in entry] or [key for key in ("text",) if key in entry]
    if not columns:
        raise ValueError("no caption: it needs captions, caption or caption_1")
    check_any(entry, columns)
    pairs: list[tuple[Any, Any]] = []
    for key in columns:
        value = None if is_hole(entry[key]) else entry[key]
        numbered = f"source_lang_{key.removeprefix('caption_')}"
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
    pairs = [(text, code) for text, code in pairs if not is_missing(text)]
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
    values = [x for key in named for x in as_list(entry[key]) if not is_hole(x)]
    if not all(isinstance(x, str) for x in values):
        raise ValueError("hard_negatives must be a string, or a list of them")
    return tuple(clean(x) for x in values if is_text(x))


def as_list(value: Any) -> list[Any]:
    """Returns a list as it is, and a value as the only one of a list."""
    return value if isinstance(value, list) else [value]
