"""`supclap reproduce`: the paper's tables and figures on the synthetic corpus, and what they say of
its claims.

Runs are independent and keep their results: after an interruption the same command goes on.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import Interrupted, UserError
from ..files import write_json, write_text
from ..progress import Bar
from ..ranks import choose_device
from .corpora import make_corpora, take_recordings
from .experiments import (
    Experiment,
    carry_out,
    check_settings,
    plan_experiments,
)  # fmt: skip
from .findings import Findings
from .presets import PRESETS, Preset
from .text import Report

ERROR = "error.txt"  # in an experiment's folder
SIGNALS = {signal.SIGINT, signal.SIGTERM}


def end_with_the_parent() -> None:
    """Ends this process however the parent ends: two must not train in one folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def work(experiment: Experiment, out: Path, preset: Preset) -> None:
    """Carries out one experiment, in a process that is started with SIGNALS blocked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own would be left behind when a process is killed
    folder = out / "runs" / experiment.folder
    try:
        carry_out(experiment, out, preset)
    except BaseException as error:
        with (folder / "output.txt").open("a", encoding="utf-8") as stream:
            traceback.print_exc(file=stream)
        (folder / ERROR).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        sys.exit(1)


def is_done(experiment: Experiment, out: Path) -> bool:
    return (out / "runs" / experiment.folder / "result.json").exists()


def cost_of(experiment: Experiment, preset: Preset) -> int:
    """Returns about how long it takes, in tenths of a run of large batches: small steps cost
    more."""
    settings = experiment.settings
    size = settings.get("batch_size", preset.batch_size)
    return round(settings.get("epochs", preset.epochs) / preset.epochs * (10 + 80 / size))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keeps other reproductions out of the folder; SIGTERM is heard as Ctrl-C is."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with (out / "lock").open("w") as stream:
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ModuleNotFoundError:  # not on this system
            pass
        except BlockingIOError:
            raise UserError(f"another reproduction works in {out}") from None
        before = signal.signal(signal.SIGTERM, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def reproduce(
    preset: str | None, out: Path, jobs: int | None = None, real: Path | None = None
) -> Path:
    """Carries out every experiment that has no result yet, then writes `results.json`, `report.md`
    and the figures. Returns the report's path.

    `real`: a folder with manifests `train`, `val` and `test` of recordings; the main comparisons
    are made on them.
    """
    if (preset is None) == (real is None):
        raise UserError("name a --preset, or a folder of recordings by --real")
    preset = preset or "real"
    settings = PRESETS[preset]
    if jobs is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jobs = 1 if settings.device == "cuda" else cores or 1
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    choose_device(settings.device)  # what is missing says so now
    from .figures import draw_all

    check_settings(out, preset, real)
    start, spent = time.monotonic(), out / "seconds.json"
    before = json.loads(spent.read_text(encoding="utf-8")) if spent.exists() else 0.0
    with alone(out):
        try:
            if real is None:
                make_corpora(out, settings)
            elif not (out / "here/test.jsonl").exists():
                take_recordings(real, out, settings)
            plan = plan_experiments(settings)
            left = [experiment for experiment in plan if not is_done(experiment, out)]
            print(f"{len(plan)} runs, {len(left)} left, {jobs} at a time")
            carry_out_all(left, out, settings, jobs)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; finished runs are kept in {out}, the same command goes on"
            ) from None
        finally:
            write_json(spent, before + time.monotonic() - start)
    findings = Findings(out, settings)
    report = Report(findings, preset)
    seconds = json.loads(spent.read_text(encoding="utf-8"))
    write_json(out / "results.json", {"preset": preset, "seconds": seconds} | report.as_json())
    path = out / "report.md"
    write_text(path, report.text(draw_all(findings, out)))
    return path


def carry_out_all(left: list[Experiment], out: Path, preset: Preset, jobs: int) -> None:
    """Carries out experiments in processes of their own, with a bar that knows what each costs."""
    waiting, failed = list(reversed(left)), []
    running: dict[Any, tuple[Any, Experiment]] = {}
    bar = Bar(
        total=sum(cost_of(experiment, preset) for experiment in left),
        desc="runs", smoothing=0.1,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
        disable=not left,
    )  # fmt: skip
    with bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    start_next(waiting, running, out, preset)
                for sentinel in wait(list(running)):
                    process, experiment = running.pop(sentinel)
                    process.join()
                    bar.update(cost_of(experiment, preset))
                    bar.set_postfix_str(experiment.folder)
                    if not is_done(experiment, out):
                        reason = why_it_failed(process, experiment, out)
                        failed.append(f"{experiment.folder}: {reason}")
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a second Ctrl-C waits
            for process, _ in running.values():
                process.kill()  # a run that is killed goes on from its checkpoint
            for process, _ in running.values():
                process.join()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if failed:
        raise UserError(
            f"{len(failed)} runs failed (see output.txt in {out / 'runs'}):\n  "
            + "\n  ".join(failed[:5])
        )


@functools.cache
def workplace() -> Any:
    """Where processes come from: a server that has imported what they need, if there can be one.
    The first process starts it, with SIGNALS blocked; so they all begin."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([carry_out.__module__])
    return context


def start_next(
    waiting: list[Experiment], running: dict[Any, tuple[Any, Experiment]], out: Path, preset: Preset
) -> None:
    """Takes the last of those that wait and starts its process."""
    experiment = waiting.pop()
    folder = out / "runs" / experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ERROR).unlink(missing_ok=True)
    process = workplace().Process(target=work, args=(experiment, out, preset), daemon=True)
    # No signal between the start of a process and the note of it; and it begins with them blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    process.start()
    running[process.sentinel] = (process, experiment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def why_it_failed(process: Any, experiment: Experiment, out: Path) -> str:
    """Returns why an experiment left no result."""
    message = out / "runs" / experiment.folder / ERROR
    if message.exists():
        return message.read_text(encoding="utf-8")
    return f"its process ended with {process.exitcode} (a signal if negative: out of memory?)"
