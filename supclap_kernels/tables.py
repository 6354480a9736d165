"""What `tune` measured on this machine: tables in the user's cache folder, one for each device.

A table is used by the machine, the versions and the build that made it, and by no other.
"""

import functools
import hashlib
import json
import math
import os
import platform
import re
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import native
from .backends.call import Route
from .backends.estimate import Kind
from .options import MIRROR, PLAIN

HERE = "measured here by tune"
REACH = 2.0
"""A table speaks of batches up to so many times its largest."""
LARGEST = 2**40
"""More pairs than any table has measured."""


class Measured(NamedTuple):
    """Milliseconds of each way by the size of the batch, for one kind of call."""

    sizes: tuple[int, ...]
    times: tuple[dict[str, float], ...]

    def near(self, N: int) -> int:
        """The place of the measured size that is nearest."""
        return min(range(len(self.sizes)), key=lambda n: abs(math.log(self.sizes[n] / N)))

    def fastest(self, N: int, ways: tuple[str, ...], eager_fits: bool) -> Route | None:
        """Of these ways and, if it fits into the memory, eager PyTorch; None where none of the ways
        was measured, or nothing near such a batch."""
        row = self.times[self.near(N)]
        times = {way: row[way] for way in ways if way in row}
        if not times or N > REACH * self.sizes[-1]:
            return None
        if eager_fits and "reference" in row:
            times["reference"] = row["reference"]
        return Route(min(times, key=times.__getitem__), None, HERE)

    def numbers(self, N: int) -> str:
        n = self.near(N)
        return f"at N = {self.sizes[n]}: {listed(self.times[n])}"


def listed(times: dict[str, float]) -> str:
    """Milliseconds of each way, the fastest first."""
    rising = sorted(times.items(), key=lambda item: item[1])
    return ", ".join(f"{way} {ms:.3g} ms" for way, ms in rising)


class Table(NamedTuple):
    """All that was measured on a device."""

    kinds: dict[str, Measured]

    def of(self, kind: Kind) -> Measured | None:
        return self.kinds.get(name_of(kind))


def name_of(kind: Kind) -> str:
    """Calls of one name share their times: whatever D is, `shared` and one-sided, and SigLIP with
    support vectors."""
    mode = {PLAIN: "plain", MIRROR: "mirror"}.get(kind.mode, "one-sided")
    if not kind.infonce:
        mode = "plain" if kind.mode == PLAIN else "one-sided"
    return f"{str(kind.dtype)[6:]} {mode} {'infonce' if kind.infonce else 'siglip'}"


def folder() -> Path:
    """SUPCLAP_CACHE, else a folder of the user's cache. RuntimeError: there is no home either."""
    own = os.environ.get("SUPCLAP_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "supclap_kernels"


@functools.cache
def cpu_model() -> str:
    try:
        information = Path("/proc/cpuinfo").read_text()
    except OSError:
        information = ""
    line = re.search(r"^model name\s*:\s*(.+)$", information, re.MULTILINE)
    return line[1].strip() if line else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """A CPU's names its instructions and threads, too."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    module, _ = native.load()
    isa = "no kernels" if module is None else module.isa()
    return f"{cpu_model()}, {isa}, {torch.get_num_threads()} threads"


def path_of(device: torch.device) -> Path:
    words = re.findall(r"[a-z0-9]+", device_name(device).lower())
    return folder() / f"tuned-{'-'.join(words)}.json"


@functools.cache
def build() -> str:
    """Names the code that runs: the Python files and the compiled module of this package."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.glob("_native*")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def made_for(device: torch.device) -> dict[str, str]:
    """What a table is valid for."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    versions = {"torch": torch.__version__, "triton": triton, "cuda": str(torch.version.cuda)}
    return {"device": device_name(device), **versions, "build": build()}


def parsed(text: str) -> tuple[dict[str, Any], Table]:
    """What a file says of itself, and its table. Raises on what is none."""
    content = json.loads(text)
    kinds = {}
    for name, rows in content["milliseconds"].items():
        sizes = tuple(map(int, rows))
        if not sizes or list(map(str, sizes)) != list(rows):
            raise ValueError(f"sizes of {name!r} are no numbers")
        if list(sizes) != sorted(sizes) or not 1 <= sizes[0] <= sizes[-1] <= LARGEST:
            raise ValueError(f"sizes of {name!r} are out of order or of range")
        for ms in (ms for row in rows.values() for ms in row.values()):
            if type(ms) not in (int, float) or not 0 < float(ms) < math.inf:
                raise ValueError(f"times of {name!r} are no positive numbers")
        kinds[name] = Measured(sizes, tuple(dict(row) for row in rows.values()))
    return dict(content["made_for"]), Table(kinds)


def load(device: torch.device) -> Table | None:
    """The table of a device, if there is one that is valid here."""
    try:
        path = path_of(device)
    except RuntimeError:  # no folder is this user's
        return None
    return load_from(path, device)


@functools.cache
def load_from(path: Path, device: torch.device) -> Table | None:
    try:
        if not path.is_file():
            return None
    except OSError:  # not for this user to look at
        return None
    try:
        made, table = parsed(path.read_text())
        here = made_for(device)
        differing = [name for name in here if made.get(name) != here[name]]
    except Exception as error:  # whatever a file may hold
        ignore(path, f"it is broken ({error or type(error).__name__})")
        return None
    if differing:
        ignore(path, f"{', '.join(differing)} changed since it was made")
        return None
    return table


def ignore(path: Path, reason: str) -> None:
    warnings.warn(
        f"supclap_kernels: ignoring the table {path}: {reason}; run `python -m supclap_kernels "
        "tune` again, or remove it by `tune --reset`",
        stacklevel=2,
    )


def place_for(device: torch.device) -> Path:
    """Where the table of a device goes: the folder is there then. OSError, RuntimeError: it cannot
    be."""
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    trial = path.with_suffix(f".{os.getpid()}")
    trial.touch()
    trial.unlink()
    return path


def save(device: torch.device, kinds: dict[str, dict[int, dict[str, float]]]) -> Path:
    """Writes the milliseconds of {kind: {N: {way: ms}}} as the table of a device."""
    path = place_for(device)
    content = {"made_for": made_for(device), "milliseconds": kinds}
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    fresh.replace(path)  # whole or not at all
    load_from.cache_clear()
    return path


def reset(device: torch.device) -> bool:
    """Removes the table of a device; whether there was one."""
    path = path_of(device)
    found = path.is_file()
    if found:
        path.unlink()
    load_from.cache_clear()
    return found
