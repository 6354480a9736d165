"""What a reproduction measured: results by loss and settings, their logs, and numbers of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..evaluate import mean_recall
from ..logs import read_lines
from .experiments import (
    HERE,
    INFONCE,
    LITERAL,
    Experiment,
    initial,
    plan_experiments,
)  # fmt: skip
from .presets import Preset
from .verdicts import mean_and_deviation

WAYS = (("t2a", "text to audio"), ("a2t", "audio to text"))
Result = dict[str, Any]


def score(result: Result, side: str = "here", way: str = "t2a", metric: str = "R@1") -> float:
    """One of a result's retrieval metrics, in percent."""
    return 100.0 * float(result[side][way][metric])


def recall(result: Result, side: str = "here") -> float:
    """R@1 of both directions, averaged, in percent."""
    return (score(result, side, "t2a") + score(result, side, "a2t")) / 2


def zero_shot(result: Result) -> float:
    return 100 * float(result["zeroshot"])


def pairs_of(more: list[Result], less: list[Result]) -> list[tuple[Result, Result]]:
    """Results of equal seeds."""
    by_seed = {result["seed"]: result for result in less}
    return [(x, by_seed[x["seed"]]) for x in more if x["seed"] in by_seed]


class Findings:
    """The results of the experiments that are done, read when they are asked for."""

    def __init__(self, out: Path, preset: Preset) -> None:
        self.out, self.preset = out, preset
        self.seeds = 1 + max(experiment.seed for experiment in plan_experiments(preset))
        self.read: dict[Path, Any] = {}

    def runs(self, name: str, data: str = HERE, **changes: Any) -> list[Result]:
        """The results of a loss with these changes, by seed."""
        found = []
        for seed in range(self.seeds):
            folder = Experiment(name, seed, data, changes).folder
            path = self.out / "runs" / folder / "result.json"
            if path not in self.read and path.exists():
                self.read[path] = json.loads(path.read_text(encoding="utf-8"))
                self.read[path]["folder"] = path.parent
            if path in self.read:
                found.append(self.read[path])
        return found

    def few(self, name: str, data: str = HERE, **changes: Any) -> list[Result]:
        """Those of the seeds that the sweeps have."""
        return [x for x in self.runs(name, data, **changes) if x["seed"] < self.preset.few]

    def literal(self, name: str) -> list[Result]:
        """By the paper's formulas as they are printed."""
        return self.runs(name, **LITERAL)

    def reading(self, name: str, reading: dict[str, Any], init: float) -> list[Result]:
        return self.runs(name, **(reading | initial(init, reading)))

    def long(self, name: str) -> list[Result]:
        """With so many more steps that training comes to rest."""
        return self.runs(name, epochs=self.preset.long * self.preset.epochs)

    def languages(self) -> list[str]:
        """Those of the test split, if they are several."""
        return sorted(self.runs(INFONCE)[0]["here"].get("languages", {}))

    def log(self, result: Result, kind: str = "log") -> list[dict[str, Any]]:
        """The lines of an experiment's log."""
        path = result["folder"] / f"{kind}.jsonl"
        if path not in self.read:
            self.read[path] = read_lines(path)
        lines: list[dict[str, Any]] = self.read[path]
        return lines

    def late(self, result: Result, key: str) -> list[float]:
        """A number of the log after the first tenth of the steps, as means over twentieths of all
        steps: what one batch is like says little."""
        values = [line[key] for line in self.log(result)]
        size = max(1, len(values) // 20)
        values = values[len(values) // 10 :]
        return [sum(values[n : n + size]) / size for n in range(0, len(values) - size + 1, size)]

    def fall(self, result: Result) -> float:
        """By how much the mean radius falls after the first tenth of the steps."""
        radii = self.late(result, "radius")
        return radii[0] - radii[-1]

    def validation(self, result: Result) -> list[tuple[int, float]]:
        """Step and R@1, averaged over directions, of each validation."""
        return [(line["step"], mean_recall(line)) for line in self.log(result, "val")]

    def best_validation(self, result: Result) -> float:
        return max(recall for _, recall in self.validation(result))

    def infonce_by_rate(self) -> dict[float, list[Result]]:
        """InfoNCE at each learning rate, which is named as a multiple of the preset's."""
        rates = sorted({*self.preset.rates, 1.0})
        return {
            rate: self.runs(INFONCE) if rate == 1 else self.runs(INFONCE, lr=rate * self.preset.lr)
            for rate in rates
        }

    def best_rate(self) -> float:
        """The learning rate of the best InfoNCE, by the validation split."""
        means = {
            rate: mean_and_deviation([self.best_validation(x) for x in results])[0]
            for rate, results in self.infonce_by_rate().items()
        }
        return max(means, key=means.__getitem__)

    def baseline(self) -> list[Result]:
        """The best InfoNCE: what every claim of better or faster is held against."""
        return self.infonce_by_rate()[self.best_rate()]

    def difficulty(self, results: list[Result], key: str) -> list[float]:
        """One of the numbers of difficulty.py, of the results that have it."""
        values = [result["difficulty"][key] for result in results]
        return [value for value in values if value is not None]

    def mean_diagnostic(self, result: Result, key: str) -> float:
        """The mean of a number over the lines of an experiment's diagnostics."""
        values = [line[key] for line in self.log(result, "diagnostics")]
        return float(sum(values) / len(values))

    def norm_variation(self, result: Result) -> float:
        """The deviation of the gradient's norm over steps, in units of its mean, after the first
        tenth."""
        norms = [line["norm"] for line in self.log(result)]
        mean, deviation = mean_and_deviation(norms[len(norms) // 10 :])
        return deviation / mean

    def steps_sooner(self, result: Result, other: Result) -> float:
        """By how many steps `result` comes sooner than `other` to the best R@1 that both reach."""
        curves = [self.validation(result), self.validation(other)]
        goal = min(max(recall for _, recall in curve) for curve in curves)
        first, last = (next(step for step, r in curve if r >= goal) for curve in curves)
        return float(last - first)
