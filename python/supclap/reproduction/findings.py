"""From the results of a reproduction to its tables and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..evaluate import mean_recall
from ..logs import read_lines
from ..zeroshot import TEMPLATE
from . import paper
from .experiments import LOSSES, MAIN, Experiment, Preset, read_results
from .verdicts import Verdict, mean_and_deviation

WAYS = (("t2a", "text to audio"), ("a2t", "audio to text"))
INFONCE, STATIC, DYNAMIC = MAIN
CLAIMS = (  # of R@1: what is claimed, of which loss, over which
    ("bi-DynamicSVR retrieves better than InfoNCE", DYNAMIC, INFONCE),
    ("bi-StaticSVR retrieves better than InfoNCE", STATIC, INFONCE),
    ("SigLIP: bi-DynamicSVR retrieves better", "SigLIP bi-DynamicSVR", "SigLIP"),
    ("SigLIP: bi-StaticSVR retrieves better", "SigLIP bi-StaticSVR", "SigLIP"),
    ("bilateral is better than one-sided (static)", STATIC, "uni-StaticSVR"),
    ("bilateral is better than one-sided (dynamic)", DYNAMIC, "uni-DynamicSVR"),
    ("a dynamic radius is better than a static one", DYNAMIC, STATIC),
    ("the constraint on the radius helps", DYNAMIC, f"{DYNAMIC}, no constraint"),
)
Result = dict[str, Any]
Cell = str | float | None | tuple[float, float]
"""A word, a number, nothing, or mean and deviation over seeds."""


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[Cell]]
    note: str = ""


def score(result: Result, side: str = "here", way: str = "t2a", metric: str = "R@1") -> float:
    """One of a result's retrieval metrics, in percent."""
    return 100.0 * float(result[side][way][metric])


def recall(result: Result, side: str = "here") -> float:
    """R@1 of both directions, averaged, in percent."""
    return (score(result, side, "t2a") + score(result, side, "a2t")) / 2


def points_zero_shot(result: Result) -> float:
    return 100 * float(result["zeroshot"])


def scores(results: list[Result], **which: str) -> tuple[float, float]:
    """Mean and deviation over seeds of the score that the keywords name."""
    return mean_and_deviation([score(result, **which) for result in results])


class Findings:
    """Everything a reproduction measured."""

    def __init__(self, out: Path, preset: Preset) -> None:
        self.out, self.preset = out, preset
        self.results: dict[tuple[str, str, float], list[Result]] = {}
        for result in read_results(out, preset):
            key = (result["group"], result["name"], result["value"])
            self.results.setdefault(key, []).append(result)

    def of(self, group: str, name: str, value: float = 0.0) -> list[Result]:
        """The results of one group, loss and value, by seed."""
        return self.results[group, name, value]

    def log(self, result: Result, kind: str = "log") -> list[dict[str, Any]]:
        """The lines of an experiment's log."""
        names = {"group", "name", "seed", "value", "data", "changes"}
        experiment = Experiment(**{name: result[name] for name in names})
        return read_lines(self.out / "runs" / experiment.folder / f"{kind}.jsonl")

    def few(self, name: str) -> list[Result]:
        """The ablation's results of the seeds that the sweeps have."""
        return self.of("ablation", name)[: self.preset.few]

    def validation(self, result: Result) -> list[tuple[int, float]]:
        """Step and R@1, averaged over directions, of each validation."""
        return [(line["step"], mean_recall(line)) for line in self.log(result, "val")]

    # ------------------------------------------------------------------------------------- verdicts

    def verdicts(self) -> list[Verdict]:
        """One for each claim of the paper: its differences are above zero where it is right."""
        losses = {name: self.of("ablation", name) for name in LOSSES}
        dynamic, infonce = losses[DYNAMIC], losses[INFONCE]
        verdicts: list[Verdict] = []

        def compare(
            claim: str, more: list[Result], less: list[Result],
            value: Callable[[Result], float] = recall, unit: str = "points of R@1",
        ) -> None:  # fmt: skip
            pairs = zip(more, less, strict=True)
            verdicts.append(Verdict(claim, unit, [value(a) - value(b) for a, b in pairs]))

        for claim, better, worse in CLAIMS:
            compare(claim, losses[better], losses[worse])
        for name, key in (("steps of", "update_gap"), ("force on", "drift_gap")):
            claim = f"the trajectory drifts less ({name} the texts)"
            compare(claim, dynamic, infonce, partial(self.mean_diagnostic, key=key), "cosine")
        sooner = list(map(self.steps_sooner, dynamic, infonce))
        unit = "steps sooner at the best R@1 that both reach"
        verdicts.append(Verdict("training converges faster", unit, sooner))
        for name in (STATIC, DYNAMIC):
            falls = [-self.radius_change(result) for result in losses[name]]
            claim = f"the radius falls during training ({name})"
            verdicts.append(Verdict(claim, "fall of R", falls))
        claim = "zero-shot classification is better"
        compare(claim, dynamic, infonce, points_zero_shot, "points")
        claim = "it carries over better to other acoustics"
        compare(claim, dynamic, infonce, partial(recall, side="there"))
        for noise in self.preset.noises:
            claim = f"it is better with {noise} % of the captions wrong"
            compare(claim, self.of("noise", DYNAMIC, noise), self.of("noise", INFONCE, noise))
        for size in self.preset.batch_sizes:
            claim = f"it is better at batch size {size}"
            compare(claim, self.of("batch", DYNAMIC, size), self.of("batch", INFONCE, size))
        for alpha in self.preset.alphas:
            other = self.of("alpha", DYNAMIC, alpha)
            compare(f"alpha = 1 is better than {alpha:g}", self.few(DYNAMIC), other)
        return verdicts

    def mean_diagnostic(self, result: Result, key: str) -> float:
        """The mean of a number over the lines of an experiment's diagnostics."""
        values = [line[key] for line in self.log(result, "diagnostics")]
        return float(sum(values) / len(values))

    def steps_sooner(self, result: Result, other: Result) -> float:
        """By how many steps `result` comes sooner than `other` to the best R@1 that both reach."""
        curves = [self.validation(result), self.validation(other)]
        goal = min(max(recall for _, recall in curve) for curve in curves)
        first, last = (next(step for step, r in curve if r >= goal) for curve in curves)
        return float(last - first)

    def radius_change(self, result: Result) -> float:
        """How the radius changes from the first tenth of the steps to the last."""
        radii = [line["radius"] for line in self.log(result)]
        part = max(1, len(radii) // 10)
        return (sum(radii[-part:]) - sum(radii[:part])) / part

    # --------------------------------------------------------------------------------------- tables

    def tables(self) -> list[Table]:
        preset = self.preset
        return [
            self.ablation(), self.languages(), self.cross(), self.zeroshot(),
            self.sweep("noise", "Captions of other clips", "%", preset.noises, MAIN, 0),
            self.sweep(
                "batch", "Batch size", "pairs", preset.batch_sizes, MAIN[::2], preset.batch_size
            ),
            self.sweep("alpha", "Weight of the SVR term", "alpha", preset.alphas, MAIN[2:], 1),
            self.cost(),
        ]  # fmt: skip

    def ablation(self) -> Table:
        metrics = [(way, metric) for way, _ in WAYS for metric in ("R@1", "R@10", "mAP@10")]
        rows: list[list[Cell]] = []
        for name in LOSSES:
            results = self.of("ablation", name)
            cells = [scores(results, way=way, metric=metric) for way, metric in metrics]
            rows.append([name, *cells, *paper.ABLATION[name]])
        header = ["loss", *(f"{way} {metric}" for way, metric in metrics)]
        header += [f"paper: {way} {metric}" for way, metric in metrics]
        note = f"Test split, mean of {len(self.preset.languages)} languages, %."
        return Table("Ablation", header, rows, note)

    def languages(self) -> Table:
        codes = sorted(self.preset.languages)
        rows: list[list[Cell]] = []
        for name in MAIN:
            results = self.of("ablation", name)
            for n, (way, words) in enumerate(WAYS):
                cells = [
                    mean_and_deviation(
                        [100 * x["here"]["languages"][code][way]["R@1"] for x in results]
                    )
                    for code in codes
                ]
                mean = scores(results, way=way)
                rows.append([f"{name}, {words}", *cells, mean, paper.MULTILINGUAL[name][n]])
        header = ["R@1", *codes, "mean", "paper: mean"]
        return Table("Languages", header, rows, "R@1 in %.")

    def cross(self) -> Table:
        rows: list[list[Cell]] = []
        for name in MAIN:
            cells = [
                scores(self.of(group, name), side=side, way=way)
                for group, side in (("ablation", "there"), ("cross", "here"))
                for way, _ in WAYS
            ]
            rows.append([name, *cells, *paper.CROSS[name]])
        header = ["loss", "here to there, t2a", "a2t", "there to here, t2a", "a2t"]
        header += ["paper: AudioCaps to Clotho, t2a", "a2t", "Clotho to AudioCaps, t2a", "a2t"]
        note = (
            "R@1 in % on the other corpus. 'There' is played at 0.8 of its speed, in a room, over "
            f"louder noise; there to here: {self.preset.few} seeds."
        )
        return Table("Other acoustics", header, rows, note)

    def zeroshot(self) -> Table:
        rows: list[list[Cell]] = []
        for name in LOSSES:
            accuracies = [points_zero_shot(result) for result in self.of("ablation", name)]
            published = paper.ZERO_SHOT.get(name, (None, None, None))
            rows.append([name, mean_and_deviation(accuracies), *published])
        note = f"Accuracy in % on ten kinds of single events, by '{TEMPLATE}'."
        header = ["loss", "accuracy", "paper: ESC-50", "US8K", "VGGSound"]
        return Table("Zero-shot", header, rows, note)

    def sweep(
        self,
        group: str,
        title: str,
        unit: str,
        values: tuple[float, ...],
        names: tuple[str, ...],
        of_ablation: float,
    ) -> Table:
        """`of_ablation`: the value that the ablation's experiments have."""
        rows: list[list[Cell]] = []
        for value in sorted((*values, of_ablation)):
            results = [
                self.few(name) if value == of_ablation else self.of(group, name, value)
                for name in names
            ]
            cells = [scores(of_loss, way=way) for of_loss in results for way, _ in WAYS]
            rows.append([f"{value:g}", *cells])
        header = [unit, *(f"{name}, {way}" for name in names for way, _ in WAYS)]
        return Table(title, header, rows, "R@1 in %.")

    def cost(self) -> Table:
        rows: list[list[Cell]] = []
        base = [x["seconds"] for x in self.of("ablation", INFONCE)]
        for name in LOSSES:
            pairs = zip((x["seconds"] for x in self.of("ablation", name)), base, strict=True)
            ratios = [a / b for a, b in pairs if a and b]
            sizes = [x["bytes"] / 2**20 for x in self.of("ablation", name) if x["bytes"]]
            cells = [mean_and_deviation(values) if values else None for values in (ratios, sizes)]
            rows.append([name, *cells, *paper.COST.get(name, (None, None))])
        note = (
            "Time of a run as a multiple of InfoNCE's of the same seed; several runs share the "
            "machine, and a run's diagnostics and validations are in it. Memory: of the process, "
            "or what it allocated on the GPU."
        )
        header = ["loss", "time", "peak MiB", "paper: time", "paper: peak MB"]
        return Table("Cost", header, rows, note)

    def as_json(self) -> dict[str, Any]:
        def plain(cell: Cell) -> Any:
            if not isinstance(cell, tuple):
                return cell
            mean, deviation = cell
            return [mean, None if math.isnan(deviation) else deviation]

        tables = [
            {
                "title": table.title, "header": table.header, "note": table.note,
                "rows": [[plain(cell) for cell in row] for row in table.rows],
            }
            for table in self.tables()
        ]  # fmt: skip
        return {"verdicts": [verdict.as_json() for verdict in self.verdicts()], "tables": tables}
