"""From the results of a reproduction to its tables and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import paper
from .experiments import LOSSES, MAIN, Preset, Run, results
from .logs import read_lines
from .verdicts import Verdict, mean_and_deviation
from .zeroshot import TEMPLATE

WAYS = (("t2a", "text to audio"), ("a2t", "audio to text"))
INFONCE, STATIC, DYNAMIC = MAIN
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
    """In percent."""
    return 100.0 * float(result[side][way][metric])


def recall(result: Result, side: str = "here") -> float:
    """R@1 of both directions, averaged, in percent."""
    return (score(result, side, "t2a") + score(result, side, "a2t")) / 2


class Findings:
    """Everything a reproduction measured."""

    def __init__(self, out: Path, preset: Preset) -> None:
        self.out, self.preset = out, preset
        self.by_key: dict[tuple[str, str, float], list[Result]] = {}
        for result in results(out, preset):
            key = (result["group"], result["name"], result["value"])
            self.by_key.setdefault(key, []).append(result)

    def of(self, group: str, name: str, value: float = 0.0) -> list[Result]:
        """By seed."""
        return self.by_key[group, name, value]

    def log(self, result: Result, kind: str = "log") -> list[dict[str, Any]]:
        names = {"group", "name", "seed", "value", "data", "changes"}
        run = Run(**{name: result[name] for name in names})
        return read_lines(self.out / "runs" / run.folder / f"{kind}.jsonl")

    def mean_of(self, result: Result, kind: str, key: str) -> float:
        """Over a run's lines."""
        values = [line[key] for line in self.log(result, kind)]
        return sum(values) / len(values)

    def few(self, name: str) -> list[Result]:
        """The ablation's runs of the seeds that the sweeps have."""
        return self.of("ablation", name)[: self.preset.few]

    # ------------------------------------------------------------------------------------- verdicts

    def difference(
        self,
        claim: str,
        unit: str,
        value: Callable[[Result], float],
        more: list[Result],
        less: list[Result],
    ) -> Verdict:
        """Of one seed's runs; above zero where `more` has more."""
        pairs = zip(more, less, strict=True)
        return Verdict(claim, unit, [value(a) - value(b) for a, b in pairs])

    def verdicts(self) -> list[Verdict]:
        """One for each claim of the paper."""
        runs = {name: self.of("ablation", name) for name in LOSSES}
        found = []

        def better(claim: str, more: str, less: str) -> None:
            found.append(self.difference(claim, "points of R@1", recall, runs[more], runs[less]))

        better("bi-DynamicSVR retrieves better than InfoNCE", DYNAMIC, INFONCE)
        better("bi-StaticSVR retrieves better than InfoNCE", STATIC, INFONCE)
        better("SigLIP: bi-DynamicSVR retrieves better", "SigLIP bi-DynamicSVR", "SigLIP")
        better("SigLIP: bi-StaticSVR retrieves better", "SigLIP bi-StaticSVR", "SigLIP")
        better("bilateral is better than one-sided (static)", STATIC, "uni-StaticSVR")
        better("bilateral is better than one-sided (dynamic)", DYNAMIC, "uni-DynamicSVR")
        better("a dynamic radius is better than a static one", DYNAMIC, STATIC)
        better("the constraint on the radius helps", DYNAMIC, f"{DYNAMIC}, no constraint")

        def drift(key: str) -> Callable[[Result], float]:
            return lambda result: self.mean_of(result, "diagnostics", key)

        for claim, key in (
            ("the trajectory drifts less (steps of the texts)", "update_gap"),
            ("the trajectory drifts less (force on the texts)", "drift_gap"),
        ):
            one = self.difference(claim, "cosine", drift(key), runs[DYNAMIC], runs[INFONCE])
            found.append(one)
        pairs = zip(runs[DYNAMIC], runs[INFONCE], strict=True)
        sooner = [self.steps_sooner(one, other) for one, other in pairs]
        unit = "steps sooner at the best R@1 that both reach"
        found.append(Verdict("training converges faster", unit, sooner))
        for name in (STATIC, DYNAMIC):
            falls = [-self.radius_change(result) for result in runs[name]]
            found.append(Verdict(f"the radius falls during training ({name})", "fall of R", falls))
        found.append(
            self.difference(
                "zero-shot classification is better", "points",
                lambda result: 100 * result["zeroshot"], runs[DYNAMIC], runs[INFONCE],
            )
        )  # fmt: skip
        found.append(
            self.difference(
                "it carries over better to other acoustics", "points of R@1",
                lambda result: recall(result, "there"), runs[DYNAMIC], runs[INFONCE],
            )
        )  # fmt: skip
        for noise in self.preset.noises:
            pair = [self.of("noise", name, noise) for name in (DYNAMIC, INFONCE)]
            claim = f"it is better with {noise} % of the captions wrong"
            found.append(self.difference(claim, "points of R@1", recall, *pair))
        for size in self.preset.batch_sizes:
            pair = [self.of("batch", name, size) for name in (DYNAMIC, INFONCE)]
            claim = f"it is better at batch size {size}"
            found.append(self.difference(claim, "points of R@1", recall, *pair))
        for alpha in self.preset.alphas:
            claim = f"alpha = 1 is better than {alpha:g}"
            other = self.of("alpha", DYNAMIC, alpha)
            found.append(self.difference(claim, "points of R@1", recall, self.few(DYNAMIC), other))
        return found

    def validation(self, result: Result) -> list[tuple[int, float]]:
        """Step and R@1, averaged over directions, of each validation."""
        lines = self.log(result, "val")
        return [(x["step"], (x["t2a"]["R@1"] + x["a2t"]["R@1"]) / 2) for x in lines]

    def steps_sooner(self, result: Result, other: Result) -> float:
        """By how many steps `result` comes sooner than `other` to the best R@1 that both reach."""
        ours, theirs = self.validation(result), self.validation(other)
        goal = min(max(recall for _, recall in one) for one in (ours, theirs))
        first = [next(step for step, recall in one if recall >= goal) for one in (ours, theirs)]
        return float(first[1] - first[0])

    def radius_change(self, result: Result) -> float:
        """From the first tenth of the steps to the last."""
        radii = [line["radius"] for line in self.log(result)]
        part = max(1, len(radii) // 10)
        return (sum(radii[-part:]) - sum(radii[:part])) / part

    # --------------------------------------------------------------------------------------- tables

    def tables(self) -> list[Table]:
        return [
            self.ablation(), self.languages(), self.cross(), self.zeroshot(),
            self.sweep("noise", "Captions of other clips", "%", self.preset.noises, MAIN, 0),
            self.sweep(
                "batch", "Batch size", "pairs", self.preset.batch_sizes, MAIN[::2],
                self.preset.batch_size,
            ),
            self.sweep("alpha", "Weight of the SVR term", "alpha", self.preset.alphas, MAIN[2:], 1),
            self.cost(),
        ]  # fmt: skip

    def ablation(self) -> Table:
        metrics = [(way, metric) for way, _ in WAYS for metric in ("R@1", "R@10", "mAP@10")]
        rows: list[list[Cell]] = []
        for name in LOSSES:
            cells: list[Cell] = [
                mean_and_deviation([score(x, way=way, metric=m) for x in self.of("ablation", name)])
                for way, m in metrics
            ]
            rows.append([name, *cells, *paper.ABLATION[name]])
        header = ["loss", *(f"{way} {metric}" for way, metric in metrics)]
        header += [f"paper: {way} {metric}" for way, metric in metrics]
        note = f"Test split, mean of {len(self.preset.languages)} languages, %."
        return Table("Ablation", header, rows, note)

    def languages(self) -> Table:
        rows: list[list[Cell]] = []
        for name in MAIN:
            for n, (way, words) in enumerate(WAYS):
                several = self.of("ablation", name)
                cells: list[Cell] = [
                    mean_and_deviation(
                        [100 * x["here"]["languages"][code][way]["R@1"] for x in several]
                    )
                    for code in sorted(self.preset.languages)
                ]
                mean = mean_and_deviation([score(x, way=way) for x in several])
                rows.append([f"{name}, {words}", *cells, mean, paper.MULTILINGUAL[name][n]])
        header = ["R@1", *sorted(self.preset.languages), "mean", "paper: mean"]
        return Table("Languages", header, rows, "R@1 in %.")

    def cross(self) -> Table:
        rows: list[list[Cell]] = []
        for name in MAIN:
            cells: list[Cell] = []
            for group, side in (("ablation", "there"), ("cross", "here")):
                for way, _ in WAYS:
                    values = [score(x, side, way) for x in self.of(group, name)]
                    cells.append(mean_and_deviation(values))
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
            values = [100 * x["zeroshot"] for x in self.of("ablation", name)]
            wanted = paper.ZERO_SHOT.get(name, (None, None, None))
            rows.append([name, mean_and_deviation(values), *wanted])
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
        own: float,
    ) -> Table:
        """`own`: the value that the ablation's runs have."""
        rows: list[list[Cell]] = []
        for value in sorted((*values, own)):
            cells: list[Cell] = []
            for name in names:
                several = self.few(name) if value == own else self.of(group, name, value)
                cells += [
                    mean_and_deviation([score(x, way=way) for x in several]) for way, _ in WAYS
                ]
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
            cells = [mean_and_deviation(one) if one else None for one in (ratios, sizes)]
            rows.append([name, *cells, *paper.COST.get(name, (None, None))])
        note = (
            "Time of a run as a multiple of InfoNCE's of the same seed; several runs share the "
            "machine, and a run's diagnostics and validations are in it. Memory: of the process, "
            "or what it allocated on the GPU."
        )
        return Table(
            "Cost", ["loss", "time", "peak MiB", "paper: time", "paper: peak MB"], rows, note
        )

    def as_json(self) -> dict[str, Any]:
        def plain(cell: Cell) -> Any:
            if not isinstance(cell, tuple):
                return cell
            mean, deviation = cell
            return [mean, None if math.isnan(deviation) else deviation]

        tables = [
            {
                "title": t.title, "header": t.header, "note": t.note,
                "rows": [[plain(cell) for cell in row] for row in t.rows],
            }
            for t in self.tables()
        ]  # fmt: skip
        return {"verdicts": [one.as_json() for one in self.verdicts()], "tables": tables}
