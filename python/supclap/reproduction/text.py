"""The report of a reproduction, as Markdown."""

from __future__ import annotations

import math
from collections import Counter

import torch

from supclap_kernels.tables import device_name

from .claims import Claims
from .experiments import INIT, READING
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


class Report:
    """What a reproduction says, found once: claims by chapter, and tables."""

    def __init__(self, findings: Findings, preset: str) -> None:
        self.findings, self.preset = findings, preset
        self.rate = findings.best_rate()
        self.chapters = Claims(findings).chapters()
        self.verdicts = [verdict for chapter in self.chapters.values() for verdict in chapter]
        self.tables = all_tables(findings)

    def as_json(self) -> dict[str, object]:
        """Everything, for other programs."""
        return {
            "best_rate": self.rate,
            "verdicts": [verdict.as_json() for verdict in self.verdicts],
            "tables": [table.as_json() for table in self.tables],
        }

    def text(self, figures: list[str]) -> str:
        """Claims first, then tables and figures."""
        counts = Counter(verdict.word for verdict in self.verdicts)
        parts = [
            *self.beginning(),
            "## Claims",
            f"Of {len(self.verdicts)} comparisons {counts['holds']} hold, "
            f"{counts['does not hold']} do not, {counts['undecided']} are undecided. Seeds are of "
            "training (weights, order of pairs): corpus and test split are the same for all. By "
            "chance one in twenty intervals misses. The best InfoNCE, by the validation split, has "
            f"{self.rate:g} times the learning rate that all other runs have.",
        ]
        for title, chapter in self.chapters.items():
            claims = "\n".join(f"- **{v.claim}.** {v.sentence()}" for v in chapter)
            parts += [f"### {title}", claims]
        parts += [
            "## Tables",
            *map(table_text, self.tables),
            "## Figures",
            *(f"{FIGURES[name]}\n\n![{name}]({name}.png)" for name in figures),
        ]
        return "\n\n".join(parts) + "\n"

    def beginning(self) -> tuple[str, str]:
        """The title, and what was trained on what."""
        plan = self.findings.preset
        title = "# SupCLAP on a synthetic corpus"
        corpus = (
            f"{plan.clips} clips of sound events with captions in {len(plan.languages)} languages, "
            "hard negatives in order and number included"
        )
        if plan.main_only:
            title, languages = "# SupCLAP on recordings", len(self.findings.languages()) or 1
            corpus = f"{languages} languages, no clip or sentence in two splits"
        return title, (
            f"Preset `{self.preset}`: {corpus}; the built-in pair of encoders; batches of "
            f"{plan.batch_size}; {plan.seeds} seeds of the main comparisons, {plan.few} of "
            "everything else. A dynamic radius is predicted here from a summary of a row's "
            "similarities (20 numbers), not from all of them. The reading of support vectors and "
            f"radius is '{READING}' from {INIT:g} on, unless a line says otherwise: on the sphere, "
            "support vectors are unit vectors as the embeddings are; bounded, R = r sigmoid(.), "
            "and the number is R/r; beta 1: the weight of the constraint, in the paper 0.01. As "
            "printed: by the paper's formulas alone, from R = 0.1 on. Intervals are Student's t "
            "over paired seeds; a claim holds if its interval is above zero. The paper's levels "
            "are of other data and other models: compare differences, not levels. Written with "
            f"torch {torch.__version__} on {device_name(torch.device(plan.device))}."
        )
