"""The report of a reproduction, as Markdown."""

from __future__ import annotations

import math
from collections import Counter

from .findings import Cell, Findings, Table

FIGURES = {
    "figure-1-drift": "Figure 1: cosine of a step of the texts with the direction to their audio.",
    "figure-3-radius": "Figure 3: the radius during training.",
    "figure-4-similarity": "Figure 4: cosine of the test pairs after training.",
    "figure-5-convergence": "Figure 5: R@1 on the validation split during training.",
    "figure-6-initial-radius": "Figure 6: the radius from several initial values.",
    "figure-7-hard-negatives": "Figure 7: the predicted radius by the number of hard negatives.",
}


def cell_text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, float | int):
        return f"{cell:.2f}"
    mean, deviation = cell
    return f"{mean:.2f}" if math.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f}"


def table_text(table: Table) -> str:
    lines = [f"### {table.title}", "", table.note, ""]
    lines.append("| " + " | ".join(table.header) + " |")
    lines.append("|" + " --- |" * len(table.header))
    lines += ["| " + " | ".join(map(cell_text, row)) + " |" for row in table.rows]
    return "\n".join(lines)


def report_text(findings: Findings, preset: str, figures: list[str]) -> str:
    """Returns the report: claims first, then tables and figures."""
    plan = findings.preset
    verdicts = findings.verdicts()
    counts = Counter(verdict.word for verdict in verdicts)
    intervals = sum(len(v.differences) > 1 for v in verdicts)
    parts = [
        "# SupCLAP on a synthetic corpus",
        f"Preset `{preset}`: {plan.clips} clips of sound events with captions in "
        f"{len(plan.languages)} languages, hard negatives in order and number included; the "
        f"built-in pair of encoders; {plan.seeds} seeds of the ablation, {plan.few} of each sweep, "
        "one of the initial radii. A dynamic radius is predicted here from a summary of a row's "
        "similarities (20 numbers), not from all of them. "
        "Intervals are Student's t over paired seeds; a claim holds if its interval is above zero. "
        "The paper's levels are of other data and other models: compare differences, not levels.",
        "## The paper's claims",
        f"Of {len(verdicts)} comparisons {counts['holds']} hold, {counts['does not hold']} do not, "
        f"{counts['undecided']} are undecided. Seeds are of training (weights, order of pairs): "
        "corpus and test split are the same for all. "
        f"{intervals} have an interval; by chance one in twenty of such intervals misses.",
        "\n".join(f"- **{v.claim}.** {v.sentence()}" for v in verdicts),
        "## Tables",
        *map(table_text, findings.tables()),
        "## Figures",
        *(f"{FIGURES[name]}\n\n![{name}]({name}.png)" for name in figures),
    ]
    return "\n\n".join(parts) + "\n"
