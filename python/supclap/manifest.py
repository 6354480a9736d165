"""Which clips there are, and their captions: CSV, JSON, JSONL, Parquet and webdataset tars.

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

Captions are in `caption`, `caption_2`, `caption_fr`, `caption_fr_2` and `captions` (languages.py);
`hard_negative`, `hard_negative_2` and `hard_negatives` hold captions that are wrong for the clip;
every other column is unused. A clip may have any number of captions. A file is looked for in the
manifest's own folder, then in `audio/` beside it: under its name as written, then under one that
looks the same (folders.py).
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import parquet
from .errors import UserError
from .folders import EXTENSIONS, Folders, is_audio
from .languages import LANGUAGE, caption_language, language_code
from .tables import TOO_MANY, clean, csv_rows, read_text

SHOWN = 10  # problems of one manifest that an error lists
FILE_KEYS = ("audio", "file_name", "wav", "path", "id")  # of JSON, the first one counts
FILE_COLUMNS = ("file_name", "audio", "path", "wav", "filename")  # of CSV
LANGUAGE_KEYS = ("lang", "language")
WRONG = re.compile(r"hard_negatives?(_\d+)?")  # captions that are wrong for the clip


@dataclass(frozen=True)
class Clip:
    """One audio file and its captions, as the manifest names them."""

    name: str
    path: Path  # with `span`, the tar it is in
    captions: tuple[str, ...]
    languages: tuple[str, ...] = ()  # of each caption
    place: str = ""  # in the manifest, for messages
    span: tuple[int, int] | None = None  # first byte and number of bytes in a tar
    cell: tuple[str, int, int] | None = None  # column, row group and row in it, of a Parquet file
    wrong: tuple[str, ...] = ()  # captions of other sounds, which training holds against it

    def __str__(self) -> str:
        """The file and where it is named."""
        inside = f", {self.name}" if self.span or self.cell else ""
        return f"{self.path}{inside}" + (f" ({self.place})" if self.place else "")


@dataclass
class Reading:
    """What a manifest holds, so far."""

    manifest: Path
    clips: dict[Any, Clip] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unused: dict[str, None] = field(default_factory=dict)  # columns, in their order
    used: set[str] = field(default_factory=set)  # by another row: this one has a hole there
    folders: Folders = field(default_factory=Folders)

    def find(self, stems: list[str], bare: bool = False) -> tuple[str, Path]:
        """Returns the first of these files there is, else the first. `bare`: without extension."""
        suffixes = ("", *EXTENSIONS) if bare else ("",)
        names = [stem + suffix for stem in stems for suffix in suffixes]
        parent = self.manifest.parent
        for name, folder in itertools.product(names, (parent, parent / "audio")):
            path = self.folders.locate(folder, name)
            if path is not None:
                return (name if path == folder / name else relative(path, folder)), path
        name = names[0].strip()
        return name, parent / name

    def add(
        self,
        place: str,
        file: tuple[str, Path],
        captions: list[tuple[str, str]],
        span: tuple[int, int] | None = None,
        cell: tuple[str, int, int] | None = None,
        wrong: tuple[str, ...] = (),
    ) -> None:
        """Adds captions and their languages to what the file has from other rows."""
        name, path = file
        texts = tuple(text for text, _ in captions)
        languages = tuple(language for _, language in captions)
        key = (path, span, cell)
        old = self.clips.get(key)
        if old is None:
            self.clips[key] = Clip(name, path, texts, languages, place, span, cell, wrong)
        else:
            self.clips[key] = replace(
                old, captions=old.captions + texts, languages=old.languages + languages,
                wrong=old.wrong + wrong,
            )  # fmt: skip

    def captions_of(self, entry: dict[str, Any]) -> list[tuple[str, str]]:
        """Returns captions and languages of one JSON object; a ValueError says what is wrong."""
        captions, keys = captions_of(entry)
        numbered = (key for key in entry if key.startswith("source_lang_"))
        used = {*FILE_KEYS, *LANGUAGE_KEYS, *keys, *numbered, *filter(WRONG.fullmatch, entry)}
        self.used |= used
        self.unused |= dict.fromkeys(key for key in entry if key and key not in used)
        return captions


def relative(path: Path, folder: Path) -> str:
    """Returns a path from the folder, if it is below it."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def read_csv(reading: Reading) -> None:
    manifest = reading.manifest
    columns, rows = csv_rows(manifest)
    if not columns:
        raise UserError(f"manifest {manifest} is empty: it needs the columns file_name, caption_1")
    file_column = next((name for name in FILE_COLUMNS if name in columns), FILE_COLUMNS[0])
    published = "youtube_id" in columns and file_column not in columns
    places = ["youtube_id", "start_time", "audiocap_id"] if published else [file_column]
    texts_of = {name: [row[name] for _, row in rows] for name in columns}
    caption_columns = [name for name in columns if holds_captions(name, texts_of[name])]
    needed = [places[0]]
    if not caption_columns:
        needed.append("caption" if published else "caption_1")
    for name in needed:
        if name not in columns:
            raise UserError(
                f"manifest {manifest} has no column {name!r}; it has {', '.join(columns)}"
            )
    if not rows:
        raise UserError(f"manifest {manifest} is empty: it has a header and no clip")
    used = {*places, *caption_columns, *LANGUAGE_KEYS, *filter(WRONG.fullmatch, columns)}
    reading.unused |= dict.fromkeys(name for name in columns if name and name not in used)

    for line, row in rows:
        place = f"line {line}"
        name = row[places[0]] or ""
        if None in row:
            reading.problems.append(f"{place} ({name.strip()}): {TOO_MANY}")
            continue
        if not name.strip():
            reading.problems.append(f"{place}: {places[0]} is empty")
            continue
        if published:
            video, start, number = ((row.get(column) or "").strip() for column in places)
            stems = [f"{video}_{start}", video, f"Y{video}", number]
            file = reading.find([stem for stem in stems if stem], bare=True)
        else:
            file = reading.find([name])
        try:
            reading.add(place, file, captions_in(row, caption_columns), wrong=wrong_in(row))
        except ValueError as error:
            reading.problems.append(f"{place} ({file[0]}): {error}")


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
    # A wide table has holes where a translation is missing.
    columns = [name for name in columns if is_text(row[name]) or not caption_language(name)]
    captions = [(clean(row[column]), caption_language(column) or language) for column in columns]
    empty = [column for column, (text, _) in zip(columns, captions, strict=True) if not text]
    if not captions:
        raise ValueError("no caption")
    if empty:
        raise ValueError(
            f"{empty[0]} is empty; a clip with fewer captions can have a row for each caption in a "
            "file with caption_1 only"
        )
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


def read_objects(reading: Reading, entries: Iterator[tuple[str, Any]]) -> None:
    """Reads the objects of JSON and JSONL, each with its place."""
    for place, entry in entries:
        if not isinstance(entry, dict):
            reading.problems.append(f"{place}: an object was expected, found {str(entry)[:40]!r}")
            continue
        named = {key: str(entry[key]) for key in FILE_KEYS if entry.get(key) is not None}
        named = {key: name for key, name in named.items() if name.strip()}
        if named.get("audio") == "wav_path":  # WavCaps as published: a word that stands for a path
            del named["audio"]
            named.pop("file_name", None)  # a title there
        name = next(iter(named.values()), "")
        if not name:
            reading.problems.append(f"{place}: no file: it needs audio, file_name or id")
            continue
        try:
            captions, wrong = reading.captions_of(entry), wrong_in(entry)
            stems = [name, str(Path(name).with_suffix(""))] if is_audio(name) else [name]
            reading.add(place, reading.find(stems, bare=True), captions, wrong=wrong)
        except ValueError as error:
            reading.problems.append(f"{place} ({name}): {error}")


def read_json(reading: Reading) -> None:
    whole = json.loads(read_text(reading.manifest))
    data = whole.get("data") if isinstance(whole, dict) else whole
    if not isinstance(data, list):
        raise UserError(f'manifest {reading.manifest} needs a list, or one under "data"')
    read_objects(reading, ((f"entry {n}", entry) for n, entry in enumerate(data, 1)))


def read_jsonl(reading: Reading) -> None:
    def entries() -> Iterator[tuple[str, Any]]:
        text = read_text(reading.manifest)
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"line {n}", json.loads(line)
                except ValueError as error:
                    reading.problems.append(f"line {n}: not JSON: {error}")

    read_objects(reading, entries())


def read_tar(reading: Reading) -> None:
    """Reads samples: neighbours whose names agree up to the first dot."""
    with tarfile.open(reading.manifest, "r:") as tar:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in tar:
            if member.isfile():
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})[suffix.lower()] = member
        for key, parts in samples.items():
            audio = next((parts[s[1:]] for s in EXTENSIONS if s[1:] in parts), None)
            if audio is None:
                known = ", ".join(EXTENSIONS)
                reading.problems.append(f"sample {key}: no audio ({known}); it has {sorted(parts)}")
                continue
            try:
                if "json" in parts:
                    entry = json.load(tar.extractfile(parts["json"]))  # type: ignore[arg-type]
                    if not isinstance(entry, dict):
                        raise ValueError("its .json holds no object")
                    captions, wrong = reading.captions_of(entry), wrong_in(entry)
                elif "txt" in parts:
                    text = tar.extractfile(parts["txt"]).read().decode("utf-8-sig")  # type: ignore[union-attr]
                    captions, wrong = reading.captions_of({"caption": text}), ()
                else:
                    raise ValueError("no captions: neither .json nor .txt")
            except ValueError as error:
                reading.problems.append(f"sample {key}: {error}")
                continue
            span = (audio.offset_data, audio.size)
            file = (audio.name, reading.manifest)
            reading.add(f"sample {key}", file, captions, span, wrong=wrong)


def read_parquet(reading: Reading) -> None:
    """Reads rows; one whose audio is inside has the bytes of a file there."""
    stored = parquet.opened(reading.manifest)
    embedded = parquet.audio_column(stored)
    if embedded is None:
        rows = (row for _, _, row in parquet.rows_of(stored, None))
        read_objects(reading, ((f"row {n}", row) for n, row in enumerate(rows, 1)))
        return
    known: dict[str, list[parquet.Cell]] = {}
    for number, (group, index, row) in enumerate(parquet.rows_of(stored, embedded), 1):
        name = str((row.pop(embedded) or {}).get("path") or f"row-{number}")
        cell = parquet.first_alike(reading.manifest, (embedded, group, index), known, name)
        try:
            captions, wrong = reading.captions_of(row), wrong_in(row)
            file = (name, reading.manifest)
            reading.add(f"row {number}", file, captions, cell=cell, wrong=wrong)
        except ValueError as error:
            reading.problems.append(f"row {number} ({name}): {error}")


READERS = {
    ".csv": read_csv, ".tsv": read_csv, ".json": read_json, ".jsonl": read_jsonl,
    ".tar": read_tar, ".parquet": read_parquet,
}  # fmt: skip


def expand(manifest: Path) -> list[Path]:
    """Returns the 13 paths of `shard-{000..012}.tar`."""
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(manifest))
    if match is None:
        return [manifest]
    start, first, last, end = match.groups()
    if int(last) < int(first):
        raise UserError(f"manifest {manifest}: {{{first}..{last}}} counts backwards")
    numbers = range(int(first), int(last) + 1)
    return [Path(f"{start}{number:0{len(first)}d}{end}") for number in numbers]


def readings(manifest: Path) -> Iterator[Reading]:
    """Yields what each file of a manifest holds."""
    for path in expand(manifest):
        reader = READERS.get(path.suffix.lower(), read_csv)
        reading = Reading(path)
        try:
            reader(reading)
        except FileNotFoundError:
            raise UserError(f"manifest not found: {path}") from None
        except (OSError, ValueError, RecursionError, csv.Error, tarfile.TarError) as error:
            raise UserError(f"cannot read the manifest {path}: {error}") from error
        if not reading.clips and not reading.problems:
            raise UserError(f"manifest {path} is empty: it has no clip")
        yield reading


def scan_manifest(manifest: Path) -> tuple[list[Clip], list[str], list[str]]:
    """Returns all clips that can be used, what is wrong with the others, each with its manifest and
    its line, and the columns that are unused."""
    parts = list(readings(manifest))
    clips = [clip for part in parts for clip in part.clips.values()]
    problems = [f"manifest {part.manifest}, {text}" for part in parts for text in part.problems]
    unused = [name for part in parts for name in part.unused if name not in part.used]
    return clips, problems, list(dict.fromkeys(unused))


def read_manifest(manifest: Path) -> list[Clip]:
    """Returns all clips; an error lists what is wrong, with its line."""
    clips, problems, _ = scan_manifest(manifest)
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if problems[SHOWN:] else []
        raise UserError("\n  ".join([*problems[:SHOWN], *more]))
    return clips
