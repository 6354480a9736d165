"""The tables of a reproduction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..zeroshot import TEMPLATE
from . import paper
from .controls import CONTROLS
from .experiments import (
    CONTENDERS,
    DETACHED,
    DYNAMIC,
    FAST,
    HERE,
    INFONCE,
    LOSSES,
    MAIN,
    READINGS,
    STATIC,
    SVR,
    initial,
)  # fmt: skip
from .findings import WAYS, Findings, Result, recall, score, zero_shot
from .readings import KINDS, judge
from .verdicts import mean_and_deviation

Cell = str | float | None | tuple[float, float]
"""A word, a number, nothing, or mean and deviation over seeds."""


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[Cell]]
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        def plain(cell: Cell) -> Any:
            if not isinstance(cell, tuple):
                return cell
            mean, deviation = cell
            return [mean, None if math.isnan(deviation) else deviation]

        rows = [[plain(cell) for cell in row] for row in self.rows]
        return {"title": self.title, "header": self.header, "note": self.note, "rows": rows}


def scores(results: list[Result], **which: str) -> Cell:
    """Mean and deviation over seeds of the score that the keywords name."""
    return mean_and_deviation([score(result, **which) for result in results]) if results else None


def all_tables(findings: Findings) -> list[Table]:
    """Those of which there are runs."""
    preset = findings.preset
    tables = [
        ablation(findings), readings(findings), contenders(findings), controls(findings),
        convergence(findings), difficulty(findings), gradients(findings), cost(findings),
        languages(findings),
    ]  # fmt: skip
    if preset.main_only:
        return tables
    alphas, sizes = preset.alphas, preset.batch_sizes
    return [
        *tables, cross(findings), zero_shots(findings), noise(findings),
        sweep(findings, "Batch size", "batch_size", sizes, MAIN, preset.batch_size),
        sweep(findings, "Weight of the SVR term", "alpha", alphas, (DYNAMIC,), 1.0),
    ]  # fmt: skip


def ablation(findings: Findings) -> Table:
    metrics = [(way, metric) for way, _ in WAYS for metric in ("R@1", "R@10", "mAP@10")]
    rows: list[list[Cell]] = []
    for name in LOSSES:
        results = findings.runs(name)
        if not results:
            continue
        cells = [scores(results, way=way, metric=metric) for way, metric in metrics]
        rows.append([name, len(results), *cells, *paper.ABLATION[name]])
    header = ["loss", "seeds", *(f"{way} {metric}" for way, metric in metrics)]
    header += [f"paper: {way} {metric}" for way, metric in metrics]
    note = f"Test split, mean of {len(findings.languages())} languages, %."
    return Table("Ablation", header, rows, note)


def readings(findings: Findings) -> Table:
    rows: list[list[Cell]] = []

    def add(words: str, init: float, kind: str, runs: list[Result]) -> None:
        if not runs:
            return
        j = judge(findings, kind, runs)
        low, high = j.ratio
        rows.append(
            [words, init, kind, j.runs, j.recall, *j.radius, low, high, j.last_ratio,
             100 * j.beyond_twice, j.letters()]
        )  # fmt: skip

    for words, reading in READINGS.items():
        for init in findings.preset.inits:
            for kind, name in KINDS.items():
                start = initial(init, reading)["radius_init"]
                add(words, start, kind, findings.reading(name, reading, init))
        add(f"{words}, detached", DETACHED["radius_init"], "dynamic",
            findings.runs(DYNAMIC, **reading, **DETACHED))  # fmt: skip
        if words in FAST:
            changes: dict[str, Any] = {
                "radius_init": 0.5, "radius_lr": 10 * findings.preset.lr
            }  # fmt: skip
            add(f"{words}, faster radius", 0.5, "static",
                findings.runs(STATIC, **reading, **changes))  # fmt: skip
    header = [
        "reading", "initial R (bounded: R/r)", "radius", "seeds", "R@1, %", "R after a tenth",
        "R in the end", "lowest R/r", "highest R/r", "highest R/r in the end",
        "most pairs with R > 2 r, %", "meets",
    ]  # fmt: skip
    note = (
        "R/r is the median over the pairs of a batch, R its mean, both averaged over twentieths of "
        "the steps, after the first tenth; the extremes are of any seed. The rule was stated "
        "before the runs: (a) the dynamic R/r within [0, 1.1] and R > 2 r for fewer than 1 % of "
        "the pairs, the static R/r below 1.5 and in the end below 1.2; (b) R falls; (c) R@1 is not "
        "lower than that of the formulas as printed (free, R from 0.1) by more than the interval."
    )
    return Table("Readings of the radius", header, rows, note)


def contenders(findings: Findings) -> Table:
    rows: list[list[Cell]] = []
    for reading, init in CONTENDERS.items():
        for rate in sorted({*findings.preset.other_rates, 1.0}):
            changes = READINGS[reading] | {"radius_init": init}
            if rate != 1:
                changes["lr"] = rate * findings.preset.lr
            for kind, name in KINDS.items():
                runs = findings.few(name, **changes)
                if not runs:
                    continue
                j = judge(findings, kind, runs)
                low, high = j.ratio
                rows.append(
                    [reading, init, rate, kind, j.runs, j.recall, low, high, j.last_ratio,
                     100 * j.beyond_twice, "yes" if j.stays else "no"]
                )  # fmt: skip
    header = [
        "reading", "initial R (bounded: R/r)", "times the learning rate", "radius", "seeds",
        "R@1, %", "lowest R/r", "highest R/r", "highest R/r in the end",
        "most pairs with R > 2 r, %", "meets a",
    ]  # fmt: skip
    note = (
        "Of several readings that are fit, the default is one that meets (a) at these learning "
        "rates and on recordings too; of several of those, the one that leaves the paper's "
        "formulas least, which is the first. The numbers are those of the table above."
    )
    return Table("Readings that could be the default", header, rows, note)


def controls(findings: Findings) -> Table:
    rows: list[list[Cell]] = []

    def add(words: str, runs: list[Result]) -> None:
        if runs:
            mean = mean_and_deviation([recall(x) for x in runs])
            rows.append([words, len(runs), mean, *(scores(runs, way=way) for way, _ in WAYS)])

    for rate, runs in findings.infonce_by_rate().items():
        add(f"InfoNCE, {rate:g} times the learning rate", runs)
    add("InfoNCE, twice the steps", findings.runs(INFONCE, epochs=2 * findings.preset.epochs))
    for name in CONTROLS:
        add(f"InfoNCE and {name}", findings.runs(name))
    for name in SVR:
        add(name, findings.runs(name))
    note = (
        "R = 0: support vectors that are the embeddings, InfoNCE twice. Logits of one modality: "
        "support vectors half way to the partner, whose gradient is not shrunk; then with half of "
        "the push across the pull, as SVR has it, and with none of it. A pull of twice the force: "
        "the gradient of the positives' logits doubled, and nothing else."
    )
    return Table("Controls", ["loss", "seeds", "R@1, %", "t2a", "a2t"], rows, note)


def convergence(findings: Findings) -> Table:
    preset = findings.preset
    rows: list[list[Cell]] = []
    for name in MAIN:
        for times, runs in ((1, findings.runs(name)), (preset.long, findings.long(name))):
            curves = [findings.validation(x) for x in runs]
            if curves:
                last = mean_and_deviation([100 * curve[-1][1] for curve in curves])
                middle = mean_and_deviation([100 * c[3 * len(c) // 4 - 1][1] for c in curves])
                mean = mean_and_deviation([recall(x) for x in runs])
                rows.append([name, f"x {times}", len(runs), mean, middle, last])
    header = ["loss", "steps", "seeds", "R@1, %", "validation R@1 at 3/4, %", "at the end, %"]
    note = "The learning rate falls to zero over the steps that a run has."
    return Table("At equal steps and at rest", header, rows, note)


def difficulty(findings: Findings) -> Table:
    groups = {DYNAMIC: findings.runs(DYNAMIC), "as printed": findings.literal(DYNAMIC)}
    groups = {name: runs for name, runs in groups.items() if runs}
    keys = next(iter(groups.values()))[0]["difficulty"]
    rows: list[list[Cell]] = []
    for key in keys:
        known = [findings.difficulty(runs, key) for runs in groups.values()]
        rows.append([key, *(mean_and_deviation(x) if x else None for x in known)])
    note = (
        "Test pairs in batches as in training. Spearman's correlation of the radius R, of R / r "
        "and of the gap r with the rank of the caption's clip, with the number of clips within 0.1 "
        "of its cosine or above it, and with a failure at rank 1; then the mean of R."
    )
    return Table("What the radius says of a pair", ["", *groups], rows, note)


def gradients(findings: Findings) -> Table:
    rows: list[list[Cell]] = []
    for name in MAIN:
        runs = findings.runs(name)
        norms = [[line["norm"] for line in findings.log(x)] for x in runs]
        late = [mean_and_deviation(x[len(x) // 10 :])[0] for x in norms]
        variation = [findings.norm_variation(x) for x in runs]
        rows.append([name, *map(mean_and_deviation, (late, variation))])
    note = "Over the steps after the first tenth, before clipping."
    return Table("The gradient", ["loss", "norm", "deviation over mean"], rows, note)


def languages(findings: Findings) -> Table:
    codes = findings.languages()
    rows: list[list[Cell]] = []
    for name in MAIN:
        results = findings.runs(name)
        for n, (way, words) in enumerate(WAYS):
            cells: list[Cell] = [
                mean_and_deviation(
                    [100 * x["here"]["languages"][code][way]["R@1"] for x in results]
                )
                for code in codes
            ]
            mean = scores(results, way=way)
            rows.append([f"{name}, {words}", *cells, mean, paper.MULTILINGUAL[name][n]])
    return Table("Languages", ["R@1", *codes, "mean", "paper: mean"], rows, "R@1 in %.")


def cross(findings: Findings) -> Table:
    rows: list[list[Cell]] = []
    for name in MAIN:
        cells = [
            scores(findings.runs(name, data), side=side, way=way)
            for data, side in ((HERE, "there"), ("there/train", "here"))
            for way, _ in WAYS
        ]
        rows.append([name, *cells, *paper.CROSS[name]])
    header = ["loss", "here to there, t2a", "a2t", "there to here, t2a", "a2t"]
    header += ["paper: AudioCaps to Clotho, t2a", "a2t", "Clotho to AudioCaps, t2a", "a2t"]
    note = (
        "R@1 in % on the other corpus. 'There' is played at 0.8 of its speed, in a room, over "
        f"louder noise; there to here: {findings.preset.few} seeds."
    )
    return Table("Other acoustics", header, rows, note)


def zero_shots(findings: Findings) -> Table:
    rows: list[list[Cell]] = []
    for name in LOSSES:
        accuracies = [zero_shot(result) for result in findings.runs(name)]
        published = paper.ZERO_SHOT.get(name, (None, None, None))
        rows.append([name, mean_and_deviation(accuracies), *published])
    note = f"Accuracy in % on ten kinds of single events, by '{TEMPLATE}'."
    header = ["loss", "accuracy", "paper: ESC-50", "US8K", "VGGSound"]
    return Table("Zero-shot", header, rows, note)


def noise(findings: Findings) -> Table:
    rows: list[list[Cell]] = []
    for share in (0, *findings.preset.noises):
        of_loss = [
            findings.few(name, data=f"here/noise{share}" if share else HERE) for name in MAIN
        ]
        rows.append([f"{share}", *(scores(x, way=way) for x in of_loss for way, _ in WAYS)])
    header = ["%", *(f"{name}, {way}" for name in MAIN for way, _ in WAYS)]
    return Table("Captions of other clips", header, rows, "R@1 in %.")


def sweep(
    findings: Findings,
    title: str,
    setting: str,
    values: tuple[float, ...],
    names: tuple[str, ...],
    usual: float,
) -> Table:
    """`usual`: the value that the other experiments have."""
    rows: list[list[Cell]] = []
    for value in sorted((*values, usual)):
        changes: dict[str, Any] = {} if value == usual else {setting: value}
        results = [findings.few(name, **changes) for name in names]
        rows.append([f"{value:g}", *(scores(x, way=way) for x in results for way, _ in WAYS)])
    header = [setting, *(f"{name}, {way}" for name in names for way, _ in WAYS)]
    return Table(title, header, rows, "R@1 in %.")


def cost(findings: Findings) -> Table:
    rows: list[list[Cell]] = []
    base = {x["seed"]: x["seconds"] for x in findings.runs(INFONCE)}
    for name in LOSSES:
        runs = findings.runs(name)
        if not runs:
            continue
        ratios = [
            x["seconds"] / base[x["seed"]] for x in runs if x["seconds"] and base.get(x["seed"])
        ]
        sizes = [x["bytes"] / 2**20 for x in runs if x["bytes"]]
        cells: list[Cell] = [
            mean_and_deviation(values) if values else None for values in (ratios, sizes)
        ]
        rows.append([name, *cells, *paper.COST.get(name, (None, None))])
    note = (
        "Time of a run as a multiple of InfoNCE's of the same seed; several runs share the "
        "machine, and a run's diagnostics and validations are in it. Memory: of the process, "
        "or what it allocated on the GPU."
    )
    header = ["loss", "time", "peak MiB", "paper: time", "paper: peak MB"]
    return Table("Cost", header, rows, note)
