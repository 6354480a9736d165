"""Files that are there as a whole or as they were: written beside, then put in place."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError, explained


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` make a file that then takes the place of `path`; on an error nothing changes.

    Several processes may write the same file: the last one stays.
    """
    if not path.name or path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
        write(partial)
        if partial.stat().st_mode != mode:  # some libraries write for the owner alone
            with contextlib.suppress(OSError):  # not every file system has modes
                partial.chmod(mode)
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        known = explained(error)
        if known is not None:
            raise known from error
        if isinstance(error, OSError | RuntimeError | SafetensorError):
            raise UserError(f"cannot write {path}: {error}; what was there is as it was") from error
        raise


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_folder_of(path: Path, option: str) -> None:
    """Raises an error, before the work whose result goes there, if a file cannot."""
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"{option} {path}: it is a folder, a file was expected")
