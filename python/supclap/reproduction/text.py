"""The report of a reproduction, as Markdown."""

from __future__ import annotations

import math
from collections import Counter

from .claims import Claims
from .findings import Findings
from .tables import Cell, Table, all_tables

FIGURES = {
    "figure-1-drift": "Figure 1: cosine of a step of the texts with the direction to their audio.",
    "figure-3-radius": "Figure 3: the radius during training.",
    "figure-4-similarity": "Figure 4: cosine of the test pairs after training.",
    "figure-5-convergence": "Figure 5: R@1 on the validation split during training.",
    "figure-6-initial-radius": "Figure 6: the radius from several initial values, one seed each.",
    "figure-7-hard-negatives": "Figure 7: the predicted radius by the number of hard negatives.",
    "readings": "The median R/r of the readings, from an initial radius of 0.5, one seed each.",
}


def cell_text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str | int):
        return str(cell)
    if isinstance(cell, float):
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
    plan, claims = findings.preset, Claims(findings)
    chapters = claims.chapters()
    verdicts = [verdict for chapter in chapters.values() for verdict in chapter]
    counts = Counter(verdict.word for verdict in verdicts)
    recordings = plan.main_only
    corpus = (
        f"{plan.clips} clips of sound events with captions in {len(plan.languages)} languages, "
        "hard negatives in order and number included"
    )
    if recordings:
        corpus = f"{len(findings.languages()) or 1} languages, no clip or sentence in two splits"
    parts = [
        f"# SupCLAP on {'recordings' if recordings else 'a synthetic corpus'}",
        f"Preset `{preset}`: {corpus}; the "
        f"built-in pair of encoders; batches of {plan.batch_size}; {plan.seeds} seeds of the main "
        f"comparisons, {plan.few} of everything else. A dynamic radius is predicted here from a "
        "summary of a row's similarities (20 numbers), not from all of them. Support vectors are "
        "on the sphere, and R = r sigmoid(.) from R/r = 0.5 on, unless a line says otherwise; as "
        "printed: by the paper's formulas alone, from R = 0.1 on. "
        "Intervals are Student's t over paired seeds; a claim holds if its interval is above zero. "
        "The paper's levels are of other data and other models: compare differences, not levels.",
        "## Claims",
        f"Of {len(verdicts)} comparisons {counts['holds']} hold, {counts['does not hold']} do not, "
        f"{counts['undecided']} are undecided. Seeds are of training (weights, order of pairs): "
        "corpus and test split are the same for all. By chance one in twenty intervals misses. "
        f"The best InfoNCE, by the validation split, has {claims.rate:g} times the learning rate "
        "that all other runs have.",
    ]
    for title, chapter in chapters.items():
        parts += [f"### {title}", "\n".join(f"- **{v.claim}.** {v.sentence()}" for v in chapter)]
    parts += [
        "## Tables",
        *map(table_text, all_tables(findings)),
        "## Figures",
        *(f"{FIGURES[name]}\n\n![{name}]({name}.png)" for name in figures),
    ]
    return "\n\n".join(parts) + "\n"


def as_json(findings: Findings) -> dict[str, object]:
    """Everything that the report says, for other programs."""
    chapters = Claims(findings).chapters()
    return {
        "best_rate": findings.best_rate(),
        "verdicts": [v.as_json() for chapter in chapters.values() for v in chapter],
        "tables": [table.as_json() for table in all_tables(findings)],
    }
