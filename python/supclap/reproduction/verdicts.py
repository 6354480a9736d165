"""What a claim is worth after several seeds: a mean, an interval, a word."""

from __future__ import annotations

import math
from dataclasses import dataclass

T_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % points of Student's t by degrees of freedom."""


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Returns mean and sample standard deviation; nan of fewer than two."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of differences, one a seed, by Student's t."""
    mean, deviation = mean_and_deviation(values)
    if len(values) < 2:
        return -math.inf, math.inf
    half = T_95[min(len(values), len(T_95)) - 1] * deviation / math.sqrt(len(values))
    return mean - half, mean + half


@dataclass(frozen=True)
class Verdict:
    """A claim and its differences, one for each seed: above zero where it is right."""

    claim: str
    unit: str
    differences: list[float]

    @property
    def word(self) -> str:
        low, high = interval(self.differences)
        if low > 0:
            return "holds"
        return "does not hold" if high < 0 else "undecided"

    def as_json(self) -> dict[str, object]:
        low, high = interval(self.differences)
        bounds = [low, high] if math.isfinite(low) else None
        mean = mean_and_deviation(self.differences)[0]
        return {
            "claim": self.claim, "verdict": self.word, "unit": self.unit, "mean": mean,
            "interval95": bounds, "differences": self.differences,
        }  # fmt: skip

    def sentence(self) -> str:
        """Returns the sentence of the report."""
        low, high = interval(self.differences)
        mean, count = mean_and_deviation(self.differences)[0], len(self.differences)
        bounds = f"[{low:+.3g}, {high:+.3g}]" if math.isfinite(low) else "unknown"
        verb = {"holds": "It holds here", "does not hold": "It does not hold here"}.get(
            self.word, "Undecided by these seeds"
        )
        seeds = f"{count} seeds" if count > 1 else "1 seed"
        return f"{verb}: {mean:+.3g} {self.unit} (95 % interval {bounds}, {seeds})."
