"""Clips with a label instead of captions.

folder with meta/esc50.csv                  ESC-50: filename, fold, category
folder with metadata/UrbanSound8K.csv       UrbanSound8K: slice_file_name, fold, class
any CSV or TSV                              file_name (or audio, path, ...), label [, fold]
"""

from __future__ import annotations

import csv
from pathlib import Path

from .errors import UserError
from .folders import Folders
from .languages import caption_language
from .manifest import FILE_COLUMNS, OF_FILES, Clip, first_of, listed, read_manifest
from .tables import TOO_MANY, clean, csv_rows

LAYOUTS = (
    ("meta/esc50.csv", "filename", "category", "audio/{name}"),
    ("metadata/UrbanSound8K.csv", "slice_file_name", "class", "audio/fold{fold}/{name}"),
)


def is_labelled(data: Path) -> bool:
    """Whether a folder or a table has labels and no captions; a broken one has none."""
    if data.is_dir():
        return any((data / table).is_file() for table, *_ in LAYOUTS)
    if data.suffix.lower() not in (".csv", ".tsv"):
        return False
    try:
        columns, _ = csv_rows(data)
    except (OSError, ValueError, csv.Error):
        return False
    return "label" in columns and all(caption_language(name) is None for name in columns)


def read_clips_of(data: Path) -> tuple[list[Clip], list[str]]:
    """Returns the clips of a manifest, or those with labels, and the labels."""
    if not is_labelled(data):
        return read_manifest(data), []
    clips, labels, _ = labelled_clips(data)
    return clips, labels


def labelled_clips(data: Path) -> tuple[list[Clip], list[str], list[str]]:
    """Returns the clips, and the label and the fold of each."""
    layouts = [(data / table, file, label, place) for table, file, label, place in LAYOUTS]
    present = [layout for layout in layouts if layout[0].is_file()]
    if data.is_dir() and not present:
        raise UserError(
            f"{data} is neither ESC-50 (meta/esc50.csv) nor UrbanSound8K "
            "(metadata/UrbanSound8K.csv); pass a CSV with the columns audio, label"
        )
    table, file_column, label_column, pattern = present[0] if present else (data, "", "label", "")
    try:
        columns, rows = csv_rows(table)
    except FileNotFoundError:
        raise UserError(f"no such file: {table}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {table}: {error}") from error
    if not columns:
        raise UserError(f"{table} is empty: it needs columns such as audio, label")
    if not present:
        file_column = first_of(FILE_COLUMNS, columns) or ""
        if not file_column:
            raise UserError(f"{table} has no column {OF_FILES}; it has {listed(columns)}")
    for name in (file_column, label_column):
        if name not in columns:
            raise UserError(f"{table} has no column {name!r}; it has {listed(columns)}")
    if not rows:
        raise UserError(f"{table} has a header and no clip")
    base, places = (data, [pattern]) if pattern else (table.parent, ["{name}", "audio/{name}"])
    clips, labels, folds, folders = [], [], [], Folders()
    for line, row in rows:
        written = row[file_column] or ""
        name = written.strip()
        try:
            label, fold = clean(row[label_column]), clean(row.get("fold"))
        except ValueError as error:
            raise UserError(f"{table}, line {line} ({name}): {error}") from None
        if None in row:
            raise UserError(f"{table}, line {line} ({name}): {TOO_MANY}")
        if not name or not label:
            missing = file_column if not name else label_column
            raise UserError(f"{table}, line {line}: {missing} is empty")
        tried = [folders.locate(base, place.format(name=written, fold=fold)) for place in places]
        path = next((path for path in tried if path), base / places[0].format(name=name, fold=fold))
        clips.append(Clip(name, path, (), (), f"line {line}"))
        labels.append(label.replace("_", " "))
        folds.append(fold)
    return clips, labels, folds
