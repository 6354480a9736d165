"""`supclap reproduce`: the paper's tables and figures on the synthetic corpus, and what they say of
its claims.

Runs are independent and keep their results: after an interruption the same command goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

from tqdm import tqdm

from .config import Interrupted, UserError
from .experiments import PRESETS, Preset, Run, carry_out, check_settings, make_corpora, planned
from .files import write_json, write_text
from .findings import Findings
from .report_text import report_text


def start_worker() -> None:
    """The parent alone hears Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def work(given: tuple[Run, Path, Preset]) -> tuple[Run, str]:
    """A run and what went wrong."""
    run, out, preset = given
    try:
        carry_out(run, out, preset)
    except Exception as error:
        return run, f"{type(error).__name__}: {error}"
    return run, ""


def cost_of(run: Run, preset: Preset) -> float:
    """Pairs that it sees; small steps cost more."""
    size = float(run.changes.get("batch_size", preset.batch_size))
    return 1.0 + 8.0 / size


def reproduce(preset: str, out: Path, jobs: int | None = None) -> Path:
    """Carry out every run that has no result yet, then write `results.json`, `report.md` and the
    figures. Returns the report's path."""
    plan = PRESETS[preset]
    jobs = jobs or (1 if plan.device == "cuda" else os.cpu_count() or 1)
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    check_settings(out, preset)
    make_corpora(out, plan)
    runs = planned(plan)
    left = [run for run in runs if not done(run, out)]
    print(f"{len(runs)} runs, {len(left)} left, {jobs} at a time; after Ctrl-C the same goes on")
    start = time.monotonic()
    if left:
        if not (out / "features").exists():  # the first run alone fills what all share
            carry_all(left[:1], out, plan, 1)
        carry_all([run for run in left if not done(run, out)], out, plan, jobs)
    elapsed = time.monotonic() - start
    found = Findings(out, plan)
    write_json(out / "results.json", {"preset": preset, "seconds": elapsed} | found.as_json())
    from .figures import draw_all

    names = draw_all(found, out)
    report = out / "report.md"
    write_text(report, report_text(found, preset, names))
    return report


def done(run: Run, out: Path) -> bool:
    return (out / "runs" / run.folder / "result.json").exists()


def carry_all(left: list[Run], out: Path, preset: Preset, jobs: int) -> None:
    """In processes of their own, with a bar that knows what a run costs."""
    total = sum(cost_of(run, preset) for run in left)
    context = multiprocessing.get_context("spawn")
    bar = tqdm(
        total=round(total, 1), desc="runs", smoothing=0.1, mininterval=1.0,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
    )  # fmt: skip
    failed = []
    with context.Pool(jobs, start_worker, maxtasksperchild=1) as pool, bar:
        try:
            given = [(run, out, preset) for run in left]
            for run, said in pool.imap_unordered(work, given, chunksize=1):
                bar.update(cost_of(run, preset))
                bar.set_postfix_str(run.folder)
                if said:
                    failed.append((run, said))
            pool.close()
            pool.join()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()  # a run that is killed goes on from its checkpoint
            raise Interrupted(
                f"interrupted; finished runs are kept in {out}, the same command goes on"
            ) from None
    if failed:
        lines = [f"{run.folder}: {said}" for run, said in failed[:5]]
        raise UserError(
            f"{len(failed)} runs failed (see output.txt in {out / 'runs'}):\n  "
            + "\n  ".join(lines)
        )
