"""Files by the names that people and tables give them, and which of them are audio."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import soundfile

# What the decoder reads goes by the names of its formats, and by these; RAW has no header, and the
# MAT formats hold matrices.
ALSO = {
    "AIFF": ("aif", "aifc"),
    "AU": ("snd",),
    "IRCAM": ("sf",),
    "MP3": ("mp1", "mp2", "mpga"),
    "NIST": ("sph",),
    "OGG": ("oga", "opus", "spx"),
    "SVX": ("iff", "8svx", "16sv"),
    "WAV": ("wave",),
}
FIRST = ("wav", "flac", "mp3", "ogg", "opus")  # where a name without extension fits several files


def extensions() -> tuple[str, ...]:
    """Returns those of the files that the installed decoder reads: .wav, .flac, ..."""
    formats = [name for name in soundfile.available_formats() if name[:3] not in ("RAW", "MAT")]
    names = [name for kind in formats for name in (kind.lower(), *ALSO.get(kind, ()))]
    readable = dict.fromkeys([*(name for name in FIRST if name in names), *sorted(names)])
    return tuple(f".{name}" for name in readable)


EXTENSIONS = extensions()


def is_audio(name: str) -> bool:
    """Whether the extension of a name says so."""
    return Path(name).suffix.lower() in EXTENSIONS


def alike(name: str) -> str:
    """Returns the same for names that look the same: blanks at the ends, composed and decomposed
    letters, and UTF-8 or Latin-1 in the file system make no difference."""
    raw = name.encode("utf-8", "surrogateescape")  # how Python holds bytes that are not UTF-8
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return unicodedata.normalize("NFC", text).strip()


class Folders:
    """What is in some folders; each is listed at most once."""

    def __init__(self) -> None:
        self.listed: dict[Path, dict[str, list[str]]] = {}

    def names(self, folder: Path) -> dict[str, list[str]]:
        """Returns the names in a folder by their `alike`."""
        if folder not in self.listed:
            by_look = self.listed[folder] = {}
            try:
                present = os.listdir(folder)
            except OSError:  # no such folder
                present = []
            for name in sorted(present):
                by_look.setdefault(alike(name), []).append(name)
        return self.listed[folder]

    def locate(self, folder: Path, name: str) -> Path | None:
        """Returns a file of this name in a folder, else the only one of a name alike, else None."""
        written = folder / name
        try:
            if written.is_file():
                return written
        except OSError:  # a name longer than any file's
            return None
        path = Path(written.anchor) if Path(name).is_absolute() else folder
        for part in Path(name).parts[1 if Path(name).is_absolute() else 0 :]:
            same = self.names(path).get(alike(part), [])
            if part not in same and part != ".." and len(same) != 1:
                return None
            path = path / (part if part in same or part == ".." else same[0])
        return path if path.is_file() else None
