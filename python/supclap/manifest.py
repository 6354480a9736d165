"""Which clips there are and what is said of them: CSV, JSON, JSONL and webdataset tars.

    CSV    file_name, caption_1, ... caption_k [, lang]     Clotho; rows of one file are joined
           file_name, caption [, lang]                      one caption a row
           audiocap_id, youtube_id, start_time, caption     AudioCaps as published
    JSON   {"data": [{"id" | "audio", "caption" | "caption_1", ..., ["lang"]}]}   WavCaps, ML-CLAP
    JSONL  {"audio": ..., "captions": ["..."] | {"eng": ["..."]} [, "lang": "eng"]}
    tar    KEY.flac beside KEY.json ("captions", "caption" or "text") or KEY.txt; {000..012} in a
           name stands for all of them

A clip may have any number of captions. A file is looked for in the manifest's own folder, then in
`audio/` beside it.
"""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .config import UserError

LANGUAGE = "eng"  # of captions that do not say theirs
EXTENSIONS = (".wav", ".flac", ".mp3", ".ogg", ".opus")
SHOWN = 10  # problems of one manifest that an error lists


@dataclass(frozen=True)
class Clip:
    """One audio file and its captions, as the manifest names them."""

    name: str
    path: Path  # with `span`, the tar it is in
    captions: tuple[str, ...]
    languages: tuple[str, ...] = ()  # of each caption
    place: str = ""  # in the manifest, for messages
    span: tuple[int, int] | None = None  # first byte and number of bytes in a tar

    def __str__(self) -> str:
        """The file and where it is named."""
        inside = f", {self.name}" if self.span else ""
        return f"{self.path}{inside}" + (f" ({self.place})" if self.place else "")


@dataclass
class Reading:
    """What a manifest holds, so far."""

    manifest: Path
    clips: dict[Any, Clip] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def find(self, stems: list[str], bare: bool = False) -> tuple[str, Path]:
        """The first of these files there is, else the first of them. `bare`: without extension."""
        names = [
            stem + suffix for stem in stems for suffix in (("", *EXTENSIONS) if bare else [""])
        ]
        folder = self.manifest.parent
        for name in names:
            for path in (folder / name, folder / "audio" / name):
                if path.is_file():
                    return name, path
        return names[0], folder / names[0]

    def add(
        self,
        place: str,
        found: tuple[str, Path],
        captions: list[tuple[str, str]],
        span: tuple[int, int] | None = None,
    ) -> None:
        """Captions and their languages, joined to what the file has from other rows."""
        name, path = found
        texts = tuple(text for text, _ in captions)
        languages = tuple(language for _, language in captions)
        key = path if span is None else (path, *span)
        old = self.clips.get(key)
        if old is None:
            self.clips[key] = Clip(name, path, texts, languages, place, span)
        else:
            self.clips[key] = replace(
                old, captions=old.captions + texts, languages=old.languages + languages
            )


def clean(text: Any) -> str:
    """Without blanks at its ends and doubled ones."""
    return " ".join(str(text or "").split())


def csv_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[Any, Any]]]]:
    """Columns, and rows with their line; what a row has beyond the columns is under None."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        return list(columns), [(reader.line_num, row) for row in reader]


TOO_MANY = "more fields than the header has columns; a text with a comma in it needs quotes"


def read_csv(reading: Reading) -> None:
    manifest = reading.manifest
    columns, rows = csv_rows(manifest)
    if not columns:
        raise UserError(f"manifest {manifest} is empty: it needs the columns file_name, caption_1")
    published = "youtube_id" in columns and "file_name" not in columns
    needed = ["youtube_id", "caption"] if published else ["file_name"]
    if not published and "caption" not in columns:
        needed.append("caption_1")
    for name in needed:
        if name not in columns:
            raise UserError(
                f"manifest {manifest} has no column {name!r}; it has {', '.join(columns)}"
            )
    if not rows:
        raise UserError(f"manifest {manifest} is empty: it has a header and no clip")

    said_in = [name for name in columns if name == "caption" or name.startswith("caption_")]
    for line, row in rows:
        place = f"line {line}"
        if None in row:
            reading.problems.append(f"{place} ({clean(row[needed[0]])}): {TOO_MANY}")
            continue
        if not clean(row[needed[0]]):
            reading.problems.append(f"{place}: {needed[0]} is empty")
            continue
        if published:
            video, start = clean(row["youtube_id"]), clean(row.get("start_time"))
            stems = [f"{video}_{start}", video, f"Y{video}", clean(row.get("audiocap_id"))]
            found = reading.find([stem for stem in stems if stem], bare=True)
        else:
            found = reading.find([row["file_name"].strip()])
        language = clean(row.get("lang") or row.get("language")) or LANGUAGE
        captions = [(clean(row[column]), language) for column in said_in]
        empty = [column for column, (text, _) in zip(said_in, captions, strict=True) if not text]
        if empty:
            reading.problems.append(
                f"{place} ({found[0]}): {empty[0]} is empty; a clip with fewer captions can have "
                "a row for each caption in a file with caption_1 only"
            )
            continue
        reading.add(place, found, captions)


def captions_of(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Captions and their languages of one JSON object; a ValueError says what is wrong."""
    language = entry.get("lang", entry.get("language", LANGUAGE))
    given = next((entry[key] for key in ("captions", "caption", "text") if key in entry), None)
    if given is None:
        numbers = sorted(int(key[8:]) for key in entry if re.fullmatch(r"caption_\d+", key))
        pairs = [(entry[f"caption_{n}"], entry.get(f"source_lang_{n}", language)) for n in numbers]
    elif isinstance(given, dict):
        pairs = [(text, one) for one, texts in given.items() for text in listed(texts)]
    else:
        texts = listed(given)
        languages = language if isinstance(language, list) else [language] * len(texts)
        if len(languages) != len(texts):
            raise ValueError(f"{len(texts)} captions and {len(languages)} languages")
        pairs = list(zip(texts, languages, strict=True))
    if not pairs:
        raise ValueError("no caption: it needs captions, caption or caption_1")
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise ValueError("captions must be a string, a list of them, or lists by language")
    if not all(clean(text) for text, _ in pairs):
        raise ValueError("a caption is empty")
    return [(clean(text), one) for text, one in pairs]


def listed(value: Any) -> list[Any]:
    """A list, or its only element."""
    return value if isinstance(value, list) else [value]


def read_objects(reading: Reading, entries: Iterator[tuple[str, Any]]) -> None:
    """Of JSON and JSONL, each with its place."""
    for place, entry in entries:
        if not isinstance(entry, dict):
            reading.problems.append(f"{place}: an object was expected, found {str(entry)[:40]!r}")
            continue
        keys = ("audio", "file_name", "wav", "path", "id")
        named = {key: str(entry[key]).strip() for key in keys if entry.get(key) is not None}
        named = {key: name for key, name in named.items() if name}
        if named.get("audio") == "wav_path":  # WavCaps as published: a word that stands for a path
            del named["audio"]
            named.pop("file_name", None)  # a title there
        name = next(iter(named.values()), "")
        if not name:
            reading.problems.append(f"{place}: no file: it needs audio, file_name or id")
            continue
        try:
            captions = captions_of(entry)
        except ValueError as error:
            reading.problems.append(f"{place} ({name}): {error}")
            continue
        audio = Path(name).suffix.lower() in EXTENSIONS
        stems = [name, str(Path(name).with_suffix(""))] if audio else [name]
        reading.add(place, reading.find(stems, bare=True), captions)


def read_json(reading: Reading) -> None:
    whole = json.loads(reading.manifest.read_text(encoding="utf-8-sig"))
    data = whole.get("data") if isinstance(whole, dict) else whole
    if not isinstance(data, list):
        raise UserError(f'manifest {reading.manifest} needs a list, or one under "data"')
    read_objects(reading, ((f"entry {n}", entry) for n, entry in enumerate(data, 1)))


def read_jsonl(reading: Reading) -> None:
    def entries() -> Iterator[tuple[str, Any]]:
        text = reading.manifest.read_text(encoding="utf-8-sig")
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"line {n}", json.loads(line)
                except ValueError as error:
                    reading.problems.append(f"line {n}: not JSON: {error}")

    read_objects(reading, entries())


def read_tar(reading: Reading) -> None:
    """Samples are neighbours whose names agree up to the first dot."""
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
                    captions = captions_of(entry)
                elif "txt" in parts:
                    text = tar.extractfile(parts["txt"]).read().decode()  # type: ignore[union-attr]
                    captions = captions_of({"caption": text})
                else:
                    raise ValueError("no captions: neither .json nor .txt")
            except ValueError as error:
                reading.problems.append(f"sample {key}: {error}")
                continue
            span = (audio.offset_data, audio.size)
            reading.add(f"sample {key}", (audio.name, reading.manifest), captions, span)


READERS = {".csv": read_csv, ".json": read_json, ".jsonl": read_jsonl, ".tar": read_tar}


def expand(manifest: Path) -> list[Path]:
    """`shard-{000..012}.tar` -> 13 paths."""
    found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(manifest))
    if found is None:
        return [manifest]
    start, first, last, end = found.groups()
    if int(last) < int(first):
        raise UserError(f"manifest {manifest}: {{{first}..{last}}} counts backwards")
    numbers = range(int(first), int(last) + 1)
    return [Path(f"{start}{number:0{len(first)}d}{end}") for number in numbers]


def scan_manifest(manifest: Path) -> tuple[list[Clip], list[str]]:
    """All clips that can be used and what is wrong with the others."""
    clips: list[Clip] = []
    problems: list[str] = []
    for path in expand(manifest):
        reader = READERS.get(path.suffix.lower(), read_csv)
        reading = Reading(path)
        try:
            reader(reading)
        except FileNotFoundError:
            raise UserError(f"manifest not found: {path}") from None
        except (OSError, ValueError, csv.Error, tarfile.TarError) as error:
            raise UserError(f"cannot read the manifest {path}: {error}") from error
        if not reading.clips and not reading.problems:
            raise UserError(f"manifest {path} is empty: it has no clip")
        clips += reading.clips.values()
        problems += [f"manifest {path}, {problem}" for problem in reading.problems]
    return clips, problems


def read_manifest(manifest: Path) -> list[Clip]:
    """All clips; an error lists what is wrong, with its line."""
    clips, problems = scan_manifest(manifest)
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if problems[SHOWN:] else []
        raise UserError("\n  ".join([*problems[:SHOWN], *more]))
    return clips
