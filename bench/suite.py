"""The table: which peers meet at which size, and the bars that the project sets itself.

A group is one interleaved run. Only numbers of one group are ever divided by one another.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import supclap_kernels as sk

from . import gate, timing
from .peers import MIB, Peer

D = 512
SIZES = (24, 256, 1024, 4096)
MAIN, LARGE = 4096, 16384
SMALL_WORKSPACE = 32
"""MiB"""

Entry = tuple[Peer, int]
Key = tuple[str, str, int]
"""group, label of the peer, N"""


def compiler_found() -> bool:
    """torch.compile on a CPU needs a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


@dataclass(frozen=True)
class Group:
    """Peers that take turns."""

    name: str
    entries: tuple[Entry, ...]


def main_group(N: int) -> Group:
    """One-sided StaticSVR in float32: everybody."""
    peers = [Peer("eager"), Peer("ours"), Peer("ours", workspace_mib=SMALL_WORKSPACE)]
    if compiler_found():
        peers.insert(1, Peer("compile"))
    return Group(f"one-sided-{N}", tuple((peer, N) for peer in peers))


def variant_group(name: str, objective: str, bilateral: str) -> Group:
    peers = (Peer("eager", objective, bilateral), Peer("ours", objective, bilateral))
    return Group(name, tuple((peer, MAIN) for peer in peers))


def groups() -> dict[str, Group]:
    """The whole table, by name."""
    low = Peer("ours", workspace_mib=SMALL_WORKSPACE)
    found = [main_group(N) for N in SIZES]
    found += [
        variant_group("mirror", "infonce", "mirror"),
        variant_group("shared", "infonce", "shared"),
        variant_group("siglip", "siglip", "none"),
        Group("bfloat16", ((Peer("ours"), MAIN), (Peer("ours", dtype="bfloat16"), MAIN))),
        Group("large", ((low, MAIN), (low, LARGE))),
    ]
    return {group.name: group for group in found}


@dataclass(frozen=True)
class Row:
    """One peer at one size: ms for forward and backward, MiB beyond inputs and gradients."""

    group: str
    N: int
    D: int
    peer: str
    objective: str
    bilateral: str
    dtype: str
    rounds: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    least_ms: float
    peak_mib: float | None
    allocated_mib: float | None
    estimate_mib: float | None
    memory_method: str

    @property
    def key(self) -> Key:
        return self.group, self.peer, self.N


def estimate(peer: Peer, N: int) -> float | None:
    """What `memory_estimate` says about ours, in MiB."""
    if peer.kind != "ours":
        return None
    options: dict[str, Any] = dict(peer.options)
    if peer.workspace_mib is not None:
        options["workspace"] = peer.workspace_mib * MIB
    return sk.memory_estimate(N, D, getattr(torch, peer.dtype), **options) / MIB


def measure(group: Group, rounds: int = 10, memory: bool = True) -> list[Row]:
    """Check every peer against the specification, time them in turns, measure their memory."""
    torch.compiler.reset()
    steps = {}
    for peer, N in group.entries:
        loss = peer.build()
        gate.check(peer, loss, N, D)
        steps[f"{peer.label} {N}"] = timing.make_step(loss, gate.make_inputs(peer, N, D))
    times = timing.interleave(steps, rounds)
    steps.clear()
    rows = []
    for peer, N in group.entries:
        used = timing.peak_memory(peer, N, D) if memory else None
        spent = times[f"{peer.label} {N}"]
        rows.append(
            Row(
                group.name,
                N,
                D,
                peer.label,
                peer.objective,
                peer.bilateral,
                peer.dtype,
                spent.rounds,
                1e3 * spent.median,
                1e3 * spent.q1,
                1e3 * spent.q3,
                1e3 * spent.least,
                used.peak / MIB if used else None,
                used.allocated / MIB if used else None,
                estimate(peer, N),
                used.method if used else "",
            )
        )
    return rows


@dataclass(frozen=True)
class Bar:
    """A ratio of two rows of one group (MiB without `bottom`), to stay at or below `limit`."""

    name: str
    measure: str
    """"time" (medians) or "memory" (resident peaks)"""
    top: Key
    bottom: Key | None
    limit: float
    factor: float = 1.0
    """how much larger than `bottom` the task of `top` is"""

    @property
    def slug(self) -> str:
        """Its name in test ids."""
        against = self.bottom[1] if self.bottom else "bytes"
        return f"{self.top[0]}-{self.top[1]}-{against}-{self.measure}"

    def value(self, rows: Iterable[Row], robust: bool = False) -> float | None:
        """None where a row is missing. `robust`: of the least times, which load disturbs less."""
        found = {row.key: row for row in rows}
        if self.top not in found or (self.bottom is not None and self.bottom not in found):
            return None
        field = "peak_mib"
        if self.measure == "time":
            field = "least_ms" if robust else "median_ms"
        top = getattr(found[self.top], field)
        bottom = 1.0 if self.bottom is None else getattr(found[self.bottom], field)
        if top is None or bottom is None:
            return None
        return top / (bottom * self.factor)


def bars() -> list[Bar]:
    """The project's bars on a CPU."""
    main, low = f"one-sided-{MAIN}", f"ours-{SMALL_WORKSPACE}MiB"
    eager, ours, small = (main, "eager", MAIN), (main, "ours", MAIN), (main, low, MAIN)
    found = [
        Bar("N = 4096 / eager", "time", ours, eager, 0.62),
        Bar("N = 4096 / eager", "memory", ours, eager, 0.6),
        Bar("N = 4096, 32 MiB / eager", "time", small, eager, 0.85),
        Bar("N = 4096, 32 MiB / eager", "memory", small, eager, 0.25),
        Bar("N = 4096 / torch.compile", "time", ours, (main, "compile", MAIN), 0.95),
    ]
    mirror = ("mirror", "ours", MAIN), ("mirror", "eager", MAIN)
    found.append(Bar("mirror, N = 4096 / eager mirror", "time", *mirror, 0.65))
    for N in (256, 24):
        group = f"one-sided-{N}"
        found.append(Bar(f"N = {N} / eager", "time", (group, "ours", N), (group, "eager", N), 1.0))
    if has_bfloat16():
        pair = ("bfloat16", "ours-bfloat16", MAIN), ("bfloat16", "ours", MAIN)
        found.append(Bar("bfloat16, N = 4096 / float32", "time", *pair, 1 / 1.5))
    large = ("large", low, LARGE)
    pairs = (LARGE / MAIN) ** 2
    found += [
        Bar("N = 16384, 32 MiB, in MiB", "memory", large, None, 1024.0),
        Bar("N = 16384 / 16 x N = 4096, 32 MiB", "time", large, ("large", low, MAIN), 1.2, pairs),
    ]
    return found


def report(rows: Sequence[Row]) -> list[str]:
    """The bars as lines of text; those without numbers are left out."""
    lines = []
    for bar in bars():
        value = bar.value(rows)
        if value is not None:
            verdict = "met" if value <= bar.limit else "MISSED"
            lines.append(
                f"{bar.name:36s} {bar.measure:6s} {value:8.3f} <= {bar.limit:<8.3f} {verdict}"
            )
    return lines
