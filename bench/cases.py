"""What is measured: the modes, the cases of every part, and the project's bars on a CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from supclap_kernels.testing import Case as TestCase

from . import machine

Row = dict[str, Any]
"""One line of a table of results, by column."""


class Mode(NamedTuple):
    """One form of the loss."""

    objective: str
    bilateral: str
    grams: int
    """how many of A A^T and T T^T it needs; the plain loss needs none"""
    renormalize: bool = False
    """whether support vectors are put back on the sphere"""

    @property
    def plain(self) -> bool:
        return self.grams == 0

    @property
    def options(self) -> dict[str, Any]:
        """The options of `fused_svr_loss`."""
        return {
            "objective": self.objective, "bilateral": self.bilateral,
            "renormalize": self.renormalize,
        }  # fmt: skip


MODES = {
    "infonce": Mode("infonce", "none", 0),
    "one-sided": Mode("infonce", "none", 1),
    "mirror": Mode("infonce", "mirror", 2),
    "shared": Mode("infonce", "shared", 1),
    "siglip": Mode("siglip", "none", 1),
    "siglip-plain": Mode("siglip", "none", 0),
    "one-sided-sphere": Mode("infonce", "none", 1, True),
    "mirror-sphere": Mode("infonce", "mirror", 2, True),
    "siglip-sphere": Mode("siglip", "none", 1, True),
}


@dataclass(frozen=True)
class Case:
    """One loss, StaticSVR unless the mode is plain, of one batch."""

    mode: str
    N: int
    D: int
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def for_testing(self, N: int) -> TestCase:
        """The same case for `supclap_kernels.testing`, with a batch of N."""
        mode = MODES[self.mode]
        radius = "none" if mode.plain else "scalar"
        return TestCase(N=N, D=self.D, dtype=self.torch_dtype, radius=radius, options=mode.options)


# ------------------------------------------------------------------------------------------ a CPU

D = 512
SIZES = (24, 256, 1024, 4096)
MAIN, LARGE = 4096, 16384

Entry = tuple[str, Case]
"""A peer's name and what it computes."""
Key = tuple[str, str, int]
"""group, label of the peer, N"""


def label(peer: str, case: Case) -> str:
    """The peer in the CPU's table: unique within a group at each N."""
    return peer if case.dtype == "float32" else f"{peer}-{case.dtype}"


def group(mode: str, N: int, *peers: str) -> list[Entry]:
    return [(peer, Case(mode, N, D)) for peer in peers]


GROUPS: dict[str, list[Entry]] = {
    **{
        f"one-sided-{N}": group("one-sided", N, "eager", "compile", "ours", "ours-32MiB")
        for N in SIZES
    },
    **{mode: group(mode, MAIN, "eager", "ours") for mode in ("mirror", "shared", "siglip")},
    "bfloat16": [("ours", Case("one-sided", MAIN, D, dtype)) for dtype in ("float32", "bfloat16")],
    "large": [("ours-32MiB", Case("one-sided", N, D)) for N in (MAIN, LARGE)],
}
"""Peers that take turns. Only numbers of one group are ever divided by one another."""


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

    def value(self, rows: Sequence[Row], robust: bool = False) -> float | None:
        """None without the numbers. `robust`: of the least times, which load disturbs less."""
        column = "peak_mib"
        if self.measure == "time":
            column = "least_ms" if robust else "median_ms"
        values = {(row["group"], row["peer"], row["N"]): row[column] for row in rows}
        top = values.get(self.top)
        bottom = 1.0 if self.bottom is None else values.get(self.bottom)
        return None if top is None or bottom is None else top / (bottom * self.factor)


def bars() -> list[Bar]:
    """The project's bars on a CPU."""
    main, low, large = f"one-sided-{MAIN}", "ours-32MiB", ("large", "ours-32MiB", LARGE)
    pairs = [
        ("N = 4096 / eager", "time", main, MAIN, "ours", "eager", 0.62),
        ("N = 4096 / eager", "memory", main, MAIN, "ours", "eager", 0.6),
        ("N = 4096, 32 MiB / eager", "time", main, MAIN, low, "eager", 0.85),
        ("N = 4096, 32 MiB / eager", "memory", main, MAIN, low, "eager", 0.25),
        ("N = 4096 / torch.compile", "time", main, MAIN, "ours", "compile", 0.95),
        ("mirror, N = 4096 / eager mirror", "time", "mirror", MAIN, "ours", "eager", 0.65),
        ("N = 256 / eager", "time", "one-sided-256", 256, "ours", "eager", 1.0),
        ("N = 24 / eager", "time", "one-sided-24", 24, "ours", "eager", 1.0),
    ]
    if machine.has_bfloat16():
        name = "bfloat16, N = 4096 / float32"
        pairs.append((name, "time", "bfloat16", MAIN, "ours-bfloat16", "ours", 1 / 1.5))
    square, whole = "N = 16384 / 16 x N = 4096, 32 MiB", (LARGE / MAIN) ** 2
    return [
        *(
            Bar(name, measure, (group, top, N), (group, bottom, N), limit)
            for name, measure, group, N, top, bottom, limit in pairs
        ),
        Bar("N = 16384, 32 MiB, in MiB", "memory", large, None, 1024.0),
        Bar(square, "time", large, ("large", low, MAIN), 1.2, whole),
    ]


BAR_COLUMNS = ("bar", "measure", "value", "limit", "met")


def judged(rows: Sequence[Row]) -> list[Row]:
    """The bars that have numbers, against them."""
    return [
        {"bar": bar.name, "measure": bar.measure, "value": value, "limit": bar.limit,
         "met": "yes" if value <= bar.limit else "no"}
        for bar in bars()
        if (value := bar.value(rows)) is not None
    ]  # fmt: skip


def report(rows: Sequence[Row]) -> list[str]:
    """The same as lines of text."""
    return [
        f"{bar['bar']:36s} {bar['measure']:6s} {bar['value']:8.3f} <= {bar['limit']:<8.3f} "
        + ("met" if bar["met"] == "yes" else "MISSED")
        for bar in judged(rows)
    ]


# ------------------------------------------------------------------------------------------ a GPU

GPU_MODES = ("infonce", "one-sided", "mirror", "siglip", "siglip-plain")
"""The last is not this project's own case."""
BF16 = "bfloat16"
SIDE_LIMIT = 1024
"""The largest N of which tiles of every side fit on the chip (cuda:single)."""

LARGE_CASES = [
    *(Case(mode, 65_536, 768, BF16) for mode in GPU_MODES),
    *(Case(mode, 65_536, 768, BF16) for mode in ("one-sided-sphere", "mirror-sphere")),
    *(Case("one-sided", 65_536, D, BF16) for D in (512, 1024)),
    *(Case("one-sided", N, 768, BF16) for N in (16_384, 32_768)),
    *(Case("one-sided", 16_384, 768, dtype) for dtype in ("float16", "float32")),
]
SMALL_CASES = [Case(mode, N, 768, BF16) for N in SIZES for mode in GPU_MODES] + [
    Case("one-sided", N, D, dtype)
    for N in (256, 4096)
    for D, dtype in ((512, BF16), (1024, BF16), (768, "float16"), (768, "float32"))
]
LATENCY_CASES = [
    Case("mirror", 24, 1024), Case("mirror", 1024, 512, BF16),
    *(Case("mirror", N, D, dtype) for N in (24, 64, 256, 1024, 2048)
      for dtype in (BF16, "float32") for D in (512, 768, 1024)),
    *(Case(mode, N, 512, BF16) for mode in ("infonce", "one-sided", "siglip")
      for N in (24, 256, 1024)),
]  # fmt: skip

PANELS = ("triton:panel", "triton:panel-32GiB", "cuda:panel", "cuda:panel-32GiB")
RIVALS = ("linear_cross_entropy", "inf_cl", "memeff", "siglip-kernel")
LARGE_PEERS = ("eager", "compile", *PANELS, "triton:tile", "cuda:hopper", "auto", *RIVALS)
LATENCY_PEERS = (
    "eager", "compile", "reduce-overhead", "triton:panel", "triton:tile", "cuda:panel",
    "cuda:single", "auto",
)  # fmt: skip


class Part(NamedTuple):
    """What `python -m bench.run PART` measures on a GPU: the most important cases first."""

    cases: list[Case]
    peers: tuple[str, ...]


GPU_PARTS = {
    "large": Part(LARGE_CASES, LARGE_PEERS),
    "small": Part(SMALL_CASES, (*LARGE_PEERS, "cuda:single")),
    "latency": Part(LATENCY_CASES, LATENCY_PEERS),
    "sides": Part(
        [case for case in LATENCY_CASES if case.mode == "mirror" and case.N <= SIDE_LIMIT],
        ("cuda:single:16", "cuda:single:32", "cuda:single:64"),
    ),
    "kernels": Part(LARGE_CASES[:4], (*PANELS, "triton:tile", "cuda:hopper")),
}
