"""The demo: InfoNCE against bi-StaticSVR on a small corpus, with a table and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import UserError
from ..evaluate import RULE, Metrics, chance, evaluate_run, table
from ..files import write_json
from ..logs import read_lines
from ..synth import synthesise
from ..train import train


def smooth(values: list[float], window: int) -> list[float]:
    """Returns the mean of the last `window` values at each point."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def plot_runs(runs: dict[str, Path], path: Path) -> None:
    """Draws loss, radius and gap over the steps and validation recall over the epochs, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    titles = {
        "loss": "in-batch InfoNCE (both directions)",
        "radius": "semantic radius R",
        "gap": "gap r = |a - t|",
    }
    for name, run in runs.items():
        log = read_lines(run / "log.jsonl")
        for panel, key in zip(panels.flat, titles, strict=False):
            terms = ("l_t2a", "l_a2t") if key == "loss" else (key,)
            shown = [line for line in log if all(line[term] is not None for term in terms)]
            if shown:
                values = [sum(line[term] for term in terms) for line in shown]
                panel.plot([line["step"] for line in shown], smooth(values, 8), label=name)
        epochs = read_lines(run / "val.jsonl")
        for way, style in (("t2a", "-"), ("a2t", "--")):
            recall = [line[way]["R@1"] for line in epochs]
            label = f"{name}, {'text to audio' if way == 't2a' else 'audio to text'}"
            colour = f"C{list(runs).index(name)}"
            steps = [line["step"] for line in epochs]
            panels[1, 1].plot(steps, recall, style, color=colour, marker=".", label=label)
    for panel, title in zip(panels.flat, [*titles.values(), "validation R@1"], strict=True):
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0, 0].set_yscale("log")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def demo(out: Path, clips: int = 1000, epochs: int = 4, seed: int = 0, **options: Any) -> Path:
    """Makes a corpus, trains with and without support vectors, tests both and plots the runs.

    `options` are further settings of both runs. Returns the path of the PNG.
    """
    marker = out / "report.json"
    if out.exists() and not marker.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and not an earlier demo; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    if not marker.exists():  # from here on a later demo may write over this one
        write_json(marker, {})
    corpus = out / "corpus"
    synthesise(corpus, clips, seed, overwrite=True)
    runs = {"InfoNCE": out / "infonce", "bi-StaticSVR": out / "bi-static"}
    rows: dict[str, dict[str, Metrics]] = {}
    for (name, run), svr in zip(runs.items(), ("none", "bi-static"), strict=True):
        print(f"\n{name}")
        train(
            TrainConfig(
                data=corpus / "train.csv",
                val=corpus / "val.csv",
                out=run,
                svr=svr,
                epochs=epochs,
                seed=seed,
                overwrite=True,
                **options,
            )
        )
        rows[name], test = evaluate_run(run, corpus / "test.csv")
    rows["chance"] = chance(test.clip_of)
    write_json(marker, {"rule": RULE} | rows)
    report = out / "report.png"
    plot_runs(runs, report)
    print(f"\n{len(test.clips)} test clips, {len(test.captions)} captions, in % by this rule:")
    print(f"{RULE}\n")
    print(table(rows, ("R@1", "R@10", "mAP@10")))
    print("\nOne seed of a small synthetic corpus: a difference of a few points is noise.")
    print(f"report: {report}")
    return report
