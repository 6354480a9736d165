"""Text files of others: their encoding, and CSV that is read strictly."""

from __future__ import annotations

import codecs
import csv
import io
from pathlib import Path
from typing import Any

TOO_MANY = "more fields than the header has columns; a text with a comma in it needs quotes"
OPEN = "a quote that opens there is not closed, or one inside a text is not doubled"


def read_text(path: Path) -> str:
    """Reads a file in UTF-8. Bytes that are not stay what Python makes of them in names of files; a
    ValueError says that it is no such text at all."""
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw:
        raise ValueError("it is not text in UTF-8 (UTF-16, or no text at all); save it as UTF-8")
    return raw.decode("utf-8-sig", "surrogateescape")


def clean(text: Any) -> str:
    """Removes doubled blanks and those at the ends; a ValueError says that it is no Unicode."""
    cleaned = " ".join(str("" if text is None else text).split())
    try:
        cleaned.encode()
    except UnicodeEncodeError:
        shown = cleaned.encode("ascii", "backslashreplace").decode()
        raise ValueError(
            f"'{shown}' is not Unicode text (bytes that are not UTF-8: save the file as "
            "UTF-8; or half a surrogate pair)"
        ) from None
    return cleaned


def split_rows(text: str, blanks: bool, delimiter: str) -> list[tuple[int, list[str]]]:
    """Returns the fields of each row of a CSV with the line where it begins. `blanks`: those after
    a delimiter are dropped, so that a quote may follow them."""
    csv.field_size_limit(2**31 - 1)  # a long text is no error, and a quote's end may be far
    rows, line = [], 0
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=delimiter, strict=True, skipinitialspace=blanks)
    try:
        for fields in reader:
            if fields:
                rows.append((line + 1, fields))
            line = reader.line_num
    except csv.Error as error:
        raise csv.Error(f"line {line + 1}: {error}; {OPEN}") from error
    return rows


def csv_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[Any, Any]]]]:
    """Reads the columns, and the rows with the line where each begins; a .tsv has tabs for commas.
    What a row has beyond the columns is under None. Names may begin with a blank, unless blanks
    stand before quotes."""
    text, delimiter = read_text(path), "\t" if path.suffix.lower() == ".tsv" else ","
    rows = split_rows(text, False, delimiter)
    if any(
        field != field.lstrip() and field.lstrip()[:1] == '"' for _, row in rows for field in row
    ):
        rows = split_rows(text, True, delimiter)
    if not rows:
        return [], []
    columns = [name.strip() for name in rows[0][1]]
    doubled = {name for name in columns if name and columns.count(name) > 1}
    if doubled:
        raise csv.Error(f"line 1: the column {min(doubled)!r} is there several times")
    table: list[tuple[int, dict[Any, Any]]] = []
    for line, fields in rows[1:]:
        row: dict[Any, Any] = dict.fromkeys(columns) | dict(zip(columns, fields, strict=False))
        if len(fields) > len(columns):
            row[None] = fields[len(columns) :]
        table.append((line, row))
    return columns, table
