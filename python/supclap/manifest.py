"""Which clips there are, and their captions; formats.py says how manifests are written."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import parquet
from .captions import LANGUAGE_KEYS, WRONG, captions_in, captions_of, holds_captions, wrong_in
from .errors import UserError
from .folders import EXTENSIONS, Folders, is_audio
from .tables import TOO_MANY, csv_rows, read_text

SHOWN = 10  # problems of one manifest that an error lists
FILE_KEYS = ("audio", "file_name", "wav", "path", "id")  # of JSON, the first one counts
FILE_COLUMNS = ("file_name", "audio", "path", "wav", "filename")  # of CSV
OF_FILES = f"of files ({', '.join(FILE_COLUMNS)})"


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


def first_of(names: Iterable[str], columns: Iterable[str]) -> str | None:
    """Returns the first of these names that a table has."""
    return next((name for name in names if name in columns), None)


def listed(columns: list[str]) -> str:
    """Names the columns of a table, and says what separates them if its only name looks like
    several."""
    several = len(columns) == 1 and re.search(r"[,;|\t]", columns[0])
    hint = "; commas separate the columns of a .csv, tabs those of a .tsv" if several else ""
    return ", ".join(columns) + hint


def read_csv(reading: Reading) -> None:
    manifest = reading.manifest
    columns, rows = csv_rows(manifest)
    if not columns:
        raise UserError(f"manifest {manifest} is empty: it needs columns such as audio, caption")
    file_column = first_of(FILE_COLUMNS, columns)
    published = "youtube_id" in columns and file_column is None
    places = ["youtube_id", "start_time", "audiocap_id"] if published else [file_column or ""]
    texts_of = {name: [row[name] for _, row in rows] for name in columns}
    caption_columns = [name for name in columns if holds_captions(name, texts_of[name])]
    missing = [OF_FILES] * (not published and file_column is None)
    missing += ["of captions (caption, caption_1, caption_fr, ...)"] * (not caption_columns)
    if missing:
        raise UserError(
            f"manifest {manifest} has no column {' and none '.join(missing)}; it has "
            f"{listed(columns)}"
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
        sound = is_audio(path.name) and os.path.isfile(path)
        if sound or os.path.isdir(path):
            what = "a sound" if sound else "a folder"
            raise UserError(
                f"{path} is {what}, no manifest; `supclap check --help` shows the formats, and "
                "`supclap embed` takes folders of sounds"
            )
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
