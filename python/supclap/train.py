"""The training loop over a run: steps, validations, checkpoints.

run.py says what a run is made of and what a step does, step.py has its parts.

Large batches. A contrastive loss compares every pair with every other pair of the batch, so
summing `loss / accumulation_steps` over small batches is WRONG: it never sees the negatives
between them and trains a different objective. `--micro-batch-size` keeps the batch whole and only
encodes it piece by piece (`supclap_kernels.cached_step`).

Many processes (`torchrun --nproc-per-node=W -m supclap train ...`). Each encodes its share of every
batch; the loss compares across all of them, and gradients are averaged. Without dropout it is the
same run as with one.

Resuming. `supclap train --resume RUN` goes on from the last checkpoint (checkpoint.py); on a CPU
the losses are those of a run that was never interrupted, bit for bit.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from supclap_kernels import SVRLoss

from .config import TrainConfig
from .ranks import stop_asked
from .run import Run, is_due
from .step import build_loss


def train(
    config: TrainConfig, resume: bool = False, build: Callable[..., SVRLoss] = build_loss
) -> Path:
    """Trains and leaves `model.safetensors`, `config.json` and `log.jsonl` in `config.out`.

    With `--val`, `val.jsonl` has the metrics after each epoch. `resume` goes on with the run there.
    `build` makes the criterion of the settings, the batch size and the process group. Returns the
    run's folder.
    """
    run = Run(config, resume, build)
    with run.bar, contextlib.closing(run.logs), stop_asked() as stop:
        run.begin()
        while run.progress.epoch <= config.epochs and not run.ranks.any(run.enough):
            train_epoch(run, stop)
            if run.ranks.any(stop()) and run.progress.epoch <= config.epochs:
                raise run.interruption()
    run.finish()
    return run.folder


def train_epoch(run: Run, stop: Callable[[], bool]) -> None:
    """Takes the steps that are left of an epoch, or those until `stop` says so."""
    config, progress = run.config, run.progress
    run.set_modes()
    run.clock.add(None)
    for batch in run.batches():
        run.step(batch)
        if progress.batch == run.epoch_steps:  # the end of an epoch does both
            break
        validation = is_due(config.validate_every, progress.step)
        if validation:
            run.tell()
        stopped = run.ranks.any(stop())
        validated = validation and config.selection is not None
        if stopped or validated or is_due(config.checkpoint_every, progress.step):
            run.checkpoint()  # after a validation, which may have written the model
        if stopped or (validated and run.ranks.any(run.enough)):
            return
        run.clock.add(None)

    run.tell()
    progress.epoch, progress.batch = progress.epoch + 1, 0
    run.checkpoint()


class TrainModule(ModuleType):
    """This module is `supclap.train` once it is imported, and is called as its function."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = TrainModule
