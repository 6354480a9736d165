"""Languages in one form, however a table or a command line names them."""

from __future__ import annotations

import re
from functools import cache

import langcodes
from langcodes import Language, LanguageTagError

LANGUAGE = "eng"  # of captions that do not say theirs
SPEAKERS = 100_000  # fewer, and three letters behind `caption_` are rather a word than a language
WORDS = frozenset(
    "bin ext her him id man min nan new nr ori per run sid src st ts tts vec".split()
)  # words, whatever language has them for its code
SCRIPTS = {"cyrillic": "Cyrl", "devanagari": "Deva", "latin": "Latn"}  # of POSIX locales
CAPTION = re.compile(
    r"caption(?:_(?P<language>[a-z]{2,}(?:[_-][a-z]{4})?(?:[_-](?P<place>[a-z]{2}))?))?(?:_\d+)?",
    re.IGNORECASE,
)


def tag_of(name: str) -> Language:
    """Returns what a code, a name or a POSIX locale means; raises a LookupError if nothing."""
    name, _, modifier = name.strip().partition("@")
    try:
        tag = Language.get(name.partition(".")[0])
    except LanguageTagError:
        tag = langcodes.find(name)
        if name.lower() not in (tag.display_name().lower(), tag.autonym().lower()):
            raise LookupError(name) from None  # a word for it in some other language
    if not tag.is_valid() or tag.language in (None, "mul", "und", "zxx"):
        raise LookupError(name)
    if modifier in SCRIPTS:
        tag = tag.update_dict({"script": SCRIPTS[modifier]})
    if tag.script == "Hang":  # alone, or with Chinese characters: Korean either way
        tag = tag.update_dict({"script": None})
    if (tag.language, tag.territory) == ("fa", "AF"):
        return Language.make(language="prs")
    if tag.language == "tw":  # Twi, which others count as Akan
        return tag
    if tag.language == "pbt":  # the Pashto of the south stands for Pashto
        return Language.make(language="ps")
    return Language.get(langcodes.standardize_tag(tag, macro=True))


@cache
def language_code(name: str) -> str:
    """Returns the ISO 639-3 code of a language, from a code or a name, with the script if it is not
    the usual one: en, en-US, English, eng_Latn -> eng; zh-TW -> zho_Hant.

    A ValueError says that there is no such language.
    """
    try:
        tag = tag_of(name)
        alone = Language.make(language=tag.language)
        code, script = alone.to_alpha3(), tag.maximize().script
    except LookupError:
        raise ValueError(
            f"{name!r} is no language; give a code such as eng or en, or an English name"
        ) from None
    return code if script == alone.maximize().script else f"{code}_{script}"


@cache
def caption_language(column: str) -> str | None:
    """Returns the language of a column of captions, "" for one that does not say it, None for a
    column of something else.

    Captions are in `caption`, `caption_2`, `caption_fr`, `caption_fra_2`, `caption_French`,
    `caption_zho_Hant`. A language without a two-letter code and with few speakers needs its script:
    `caption_raw` and `caption_len` are hardly in Rawang and Lenca. `caption_id` numbers the
    captions: Indonesian is `caption_ind`.
    """
    match = CAPTION.fullmatch(column)
    if match is None or not column.startswith("caption"):
        return None
    name, place = match["language"], match["place"] or ""
    if name is None:
        return ""
    if name.lower() in WORDS or place.lower() in WORDS | {"no"}:
        return None
    try:
        tag, code = tag_of(name), language_code(name)
    except (LookupError, ValueError):
        return None
    known = len(tag.language or "") == 2 or "_" in name or "-" in name
    return code if known or tag.speaking_population() >= SPEAKERS else None
