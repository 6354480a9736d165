"""`supclap plot`: how runs went, side by side, in one picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import check_folder_of, write_text, write_whole
from .logs import read_lines

ENDINGS = (".png", ".svg", ".pdf", ".html")
SHOWN = {  # of log.jsonl: what is added up, and its title
    "loss": (("l_t2a", "l_a2t"), "in-batch InfoNCE (both directions)"),
    "radius": (("radius",), "semantic radius R"),
    "gap": (("gap",), "gap r = |a - t|"),
}


def smooth(values: list[float], window: int) -> list[float]:
    """Returns the mean of the last `window` values at each point."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def draw_training(panel: Any, name: str, log: list[dict[str, Any]], terms: tuple[str, ...]) -> None:
    """Draws a number of the log over the steps, if the run has it."""
    lines = [line for line in log if all(line[term] is not None for term in terms)]
    if lines:
        values = [sum(line[term] for term in terms) for line in lines]
        window = max(8, len(values) // 100)
        panel.plot([line["step"] for line in lines], smooth(values, window), label=name)


def plot_runs(runs: dict[str, Path], path: Path) -> None:
    """Draws loss, radius and gap over the steps, and validation recall, of runs by their names: as
    PNG, SVG, PDF or HTML, by the ending of `path`."""
    check_folder_of(path, "--out")
    if path.suffix not in ENDINGS:
        raise UserError(f"--out {path}: known endings are {', '.join(ENDINGS)}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for number, (name, run) in enumerate(runs.items()):
        log = read_lines(run / "log.jsonl")
        if not log:
            raise UserError(f"{run} is not a run: it has no log.jsonl")
        for panel, (terms, _) in zip(panels.flat, SHOWN.values(), strict=False):
            draw_training(panel, name, log, terms)
        validations = read_lines(run / "val.jsonl")
        steps = [line["step"] for line in validations]
        for way, style in (("t2a", "-"), ("a2t", "--")) if steps else ():
            recall = [line[way]["R@1"] for line in validations]
            label = f"{name}, {'text to audio' if way == 't2a' else 'audio to text'}"
            panels[1, 1].plot(steps, recall, style, color=f"C{number}", marker=".", label=label)
    titles = [title for _, title in SHOWN.values()]
    for panel, title in zip(panels.flat, [*titles, "validation R@1"], strict=True):
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    panels[0, 0].set_yscale("log")
    if path.suffix == ".html":
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg")
        svg = drawn.getvalue()[drawn.getvalue().index("<svg") :]
        title = ", ".join(runs)
        write_text(path, f"<!doctype html><meta charset=utf-8><title>{title}</title>\n{svg}")
    else:
        kind = path.suffix[1:]
        write_whole(path, lambda partial: figure.savefig(partial, format=kind, dpi=120))
    pyplot.close(figure)
