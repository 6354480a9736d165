"""A folder of decoded clips. Each clip has a name of its own there, made of its file's: one that is
new or has changed is decoded, and all others are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .audio import FrontEnd
from .files import write_whole
from .manifest import Clip

VERSION = 3  # changes with how a file is read


class Decoded(NamedTuple):
    """What reading a clip gave."""

    features: Tensor | None  # [F, M]; None if they are not to be kept
    longer: bool  # whether the clip is longer than max_seconds
    problem: str  # what is wrong with the file; "" if nothing is


def digest(value: Any) -> str:
    """Returns a checksum of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def key_of(clip: Clip) -> str:
    """Names a clip by its file, its place in it, and when and how long the file was written."""
    stat = clip.path.stat() if clip.path.is_file() else None
    version = (stat.st_size, stat.st_mtime_ns) if stat else None
    return digest([str(clip.path.resolve()), clip.span, clip.cell, version])


class FeatureCache:
    """The clips of a folder that one front end made features of, cut to `max_seconds`.

    A file holds the clips that were decoded together; features are mapped, not read.
    """

    def __init__(self, folder: Path, front_end: FrontEnd, max_seconds: float) -> None:
        self.folder = folder
        self.name = f"features-{digest([VERSION, front_end.key, max_seconds])}"

    def find(self, keys: list[str]) -> dict[str, Decoded]:
        """Returns those of the clips that the folder has."""
        wanted, found = set(keys), dict[str, Decoded]()
        for path in sorted(self.folder.glob(f"{self.name}-*.safetensors")):
            found |= dict(entries(path, wanted - found.keys()))
            if len(found) == len(wanted):
                break
        return found

    def add(self, decoded: dict[str, Decoded]) -> None:
        """Keeps clips, in a file of their own; not those that could not be read, which may be next
        time."""
        tensors = {key: x.features for key, x in decoded.items() if x.features is not None}
        if not tensors:
            return
        notes = {key: decoded[key].longer for key in tensors}
        path = self.folder / f"{self.name}-{digest(sorted(tensors))}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda partial: save_file(tensors, partial, {"said": json.dumps(notes)}))


def entries(path: Path, wanted: set[str]) -> Iterator[tuple[str, Decoded]]:
    """Yields the clips of a file that are wanted; none of a broken one."""
    if not wanted:
        return
    try:
        with safe_open(path, "pt") as stored:
            notes = json.loads(stored.metadata()["said"])
            for key in notes.keys() & wanted:
                yield key, Decoded(stored.get_tensor(key), notes[key], "")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError):
        return
