"""Parquet files as the Hugging Face hub has them: captions beside the bytes of audio files."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import UserError

Cell = tuple[str, int, int]
"""Column, row group, and row in it."""


def opened(path: Path) -> Any:
    """Opens a file; reads nothing of it but its schema."""
    try:
        pyarrow = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise UserError("a .parquet file needs `pip install 'supclap-kernels[parquet]'`") from None
    try:
        return pyarrow.ParquetFile(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # of a class of its own
        raise ValueError(f"no Parquet file: {error}") from error


def audio_column(stored: Any) -> str | None:
    """Returns the column that holds files, as `datasets` writes it: a struct with bytes."""
    for column in stored.schema_arrow:
        if hasattr(column.type, "fields") and "bytes" in {part.name for part in column.type}:
            return str(column.name)
    return None


def rows_of(stored: Any, embedded: str | None) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields row group, row in it, and the row, without the bytes of the column `embedded`."""
    columns = []
    for column in stored.schema_arrow:
        parts = [column.name]
        if column.name == embedded:
            parts = [f"{column.name}.{part.name}" for part in column.type if part.name != "bytes"]
        columns += parts
    for group in range(stored.num_row_groups):
        rows = stored.read_row_group(group, columns=columns, use_threads=False).to_pylist()
        for index, row in enumerate(rows):
            yield group, index, {embedded: None, **row} if embedded else row


@lru_cache(maxsize=2)
def group_of(path: str, version: int, column: str, group: int) -> Any:
    """The bytes of a row group; the neighbours of a clip are mostly asked for next."""
    stored = opened(Path(path))
    table = stored.read_row_group(group, columns=[f"{column}.bytes"], use_threads=False)
    return table.column(column).combine_chunks().field("bytes")


def bytes_of(path: Path, cell: Cell) -> bytes:
    """Returns the bytes of the audio file in a row, b"" if there are none."""
    column, group, index = cell
    try:
        value = group_of(str(path), path.stat().st_mtime_ns, column, group)[index].as_py()
    except (OSError, ValueError) as error:  # pyarrow's own are of these kinds
        raise UserError(f"the row cannot be read: {error}") from error
    return bytes(value or b"")


def read_cell(path: Path, cell: Cell) -> bytes:
    """Returns the bytes of the audio file in a row; a UserError says that there are none."""
    value = bytes_of(path, cell)
    if not value:
        raise UserError("the row has no audio")
    return value


def first_alike(path: Path, cell: Cell, known: dict[str, list[Cell]], name: str) -> Cell:
    """Returns the first row whose file has this name and these bytes: a file may be there once for
    each of its captions. `known`: rows so far, by their names; this one is added."""
    others = known.setdefault(name, [])
    if others:
        value = bytes_of(path, cell)
        for other in others:
            if value and bytes_of(path, other) == value:
                return other
    others.append(cell)
    return cell
