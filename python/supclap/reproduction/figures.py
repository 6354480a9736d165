"""Counterparts of the paper's figures, as PNGs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..plot import smooth
from .experiments import BINS, CHOSEN, DYNAMIC, MAIN, READINGS, SVR
from .findings import Findings, Result
from .text import FIGURES


def band(
    panel: Any, curves: list[tuple[list[float], list[float]]], label: str, colour: str
) -> None:
    """Draws the mean of curves at the same points, and the range between them."""
    steps = curves[0][0]
    columns = list(zip(*(values for _, values in curves), strict=True))
    panel.plot(steps, [sum(c) / len(c) for c in columns], color=colour, label=label)
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    panel.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def curve(
    findings: Findings, result: Result, kind: str, key: str
) -> tuple[list[float], list[float]]:
    lines = findings.log(result, kind)
    return [line["step"] for line in lines], smooth([line[key] for line in lines], 5)


def drift(findings: Findings, panel: Any) -> None:
    for n, name in enumerate(MAIN):
        curves = [curve(findings, x, "diagnostics", "update_gap") for x in findings.runs(name)]
        band(panel, curves, name, f"C{n}")
    panel.set(xlabel="step", ylabel="cos(step of t, a - t)")


def radius(findings: Findings, panel: Any) -> None:
    groups = {name: findings.runs(name) for name in SVR}
    groups |= {f"{name} as printed": findings.literal(name) for name in SVR}
    for n, (words, runs) in enumerate(groups.items(), 1):
        band(panel, [curve(findings, x, "log", "radius") for x in runs], words, f"C{n}")
    panel.set(xlabel="step", ylabel="R")


def similarity(findings: Findings, panel: Any) -> None:
    centres = [-1 + (2 * n + 1) / BINS for n in range(BINS)]
    for n, name in enumerate(MAIN):
        histograms = [x["similarities"] for x in findings.runs(name)]
        counts = [sum(column) for column in zip(*histograms, strict=True)]
        share = [count / sum(counts) for count in counts]
        panel.step(centres, share, where="mid", color=f"C{n}", label=name)
    panel.set(xlabel="cosine of a text and its audio", ylabel="share of the pairs")


def convergence(findings: Findings, panel: Any) -> None:
    for n, name in enumerate(MAIN):
        curves = []
        for result in findings.runs(name):
            steps, recalls = zip(*findings.validation(result), strict=True)
            curves.append((list(steps), [100 * recall for recall in recalls]))
        band(panel, curves, name, f"C{n}")
    panel.set(xlabel="step", ylabel="validation R@1, %")


def initial_radius(findings: Findings, panel: Any) -> None:
    for n, name in enumerate(SVR):
        for m, init in enumerate(findings.preset.inits):
            for result in findings.reading(name, CHOSEN, init)[:1]:
                panel.plot(*curve(findings, result, "log", "radius"), color=f"C{n + 1}",
                           label=name if m == 0 else None)  # fmt: skip
    panel.set(xlabel="step", ylabel="R")


def readings(findings: Findings, panel: Any) -> None:
    for n, (words, reading) in enumerate(READINGS.items()):
        for name, style in zip(SVR, ("--", "-"), strict=True):
            for result in findings.reading(name, reading, 0.5)[:1]:
                steps, contraction = curve(findings, result, "log", "contraction_50")
                panel.plot(steps, [1 - c for c in contraction], style, color=f"C{n}",
                           label=words if style == "-" else None)  # fmt: skip
    panel.axhline(1, color="grey", linewidth=0.5)
    panel.set(xlabel="step", ylabel="median R/r (static: dashed)", ylim=(0, 3))


def hard_negatives(findings: Findings, panel: Any) -> None:
    groups = {DYNAMIC: findings.runs(DYNAMIC), "as printed": findings.literal(DYNAMIC)}
    for n, (words, runs) in enumerate(groups.items()):
        radii = [x["radius_by_hard"] for x in runs]
        curves = [(list(map(float, by_count)), list(by_count.values())) for by_count in radii]
        band(panel, curves, words, f"C{n + 2}")
    panel.set(xlabel="hard negatives in the batch", ylabel="predicted R")


DRAW = (drift, radius, similarity, convergence, initial_radius, hard_negatives, readings)
PANELS: dict[str, Callable[[Findings, Any], None]] = dict(zip(FIGURES, DRAW, strict=True))


def draw_all(findings: Findings, out: Path) -> list[str]:
    """Draws each figure into a file, and four into `summary.png`. Returns the names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def draw_panel(draw: Callable[[Findings, Any], None], panel: Any) -> None:
        draw(findings, panel)
        panel.grid(alpha=0.3)
        panel.legend()

    for name, draw in PANELS.items():
        figure, panel = pyplot.subplots(figsize=(6, 4), layout="constrained")
        draw_panel(draw, panel)
        figure.savefig(out / f"{name}.png", dpi=110)
        pyplot.close(figure)
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for panel, draw in zip(panels.flat, (drift, convergence, radius, similarity), strict=True):
        draw_panel(draw, panel)
    figure.savefig(out / "summary.png", dpi=110)
    pyplot.close(figure)
    return list(PANELS)
