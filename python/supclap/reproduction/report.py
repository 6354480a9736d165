"""The demo: InfoNCE against bi-StaticSVR on a small corpus, with a table and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import UserError
from ..evaluate import RULE, Metrics, chance, evaluate_run, table
from ..files import write_json
from ..plot import plot_runs
from ..synth import synthesise
from ..train import train


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
