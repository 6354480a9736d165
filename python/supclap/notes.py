"""What a run tells its user that may not be expected of its settings."""

from __future__ import annotations

from .config import TrainConfig
from .corpus import Corpus
from .step import schedule

REVERSED_STEPS = 50
"""After so many steps with a median contraction below `lowest_contraction` the user is told."""


def lowest_contraction(config: TrainConfig) -> float:
    """Which median of 1 - R/r is no runaway yet: a dynamic radius has to stay within the gap; a
    static one, a number for all pairs, only follows the mean gap: up to 1.5 r is allowed."""
    return -0.5 if config.svr.endswith("static") else 0.0


def of_batches(
    config: TrainConfig, size: int, corpus: Corpus, held_out: Corpus | None
) -> list[str]:
    """Of the size of the batches and of the corpora."""
    notes = []
    if size < config.batch_size:
        notes.append(
            f"batch size {config.batch_size} is larger than the data: all {size} pairs make one "
            "batch"
        )
    one_clip = config.ids in ("clip", "both") and len(corpus.file_of.unique()) == 1
    if config.loss == "infonce" and (size == 1 or one_clip):
        notes.append(
            "NOTE: no pair of a batch has a negative: the contrastive loss is 0 and trains nothing"
        )
    if held_out is not None and len(held_out.clips) == 1:
        notes.append(
            f"NOTE: {config.selection} has one clip, which every model finds: the first epoch is "
            "kept"
        )
    return notes


def of_epochs(config: TrainConfig, before: int, step: int, epoch_steps: int) -> list[str]:
    """Of a run that goes on with another number of epochs than before."""
    if step >= config.epochs * epoch_steps:
        return []
    shares = (schedule(config, step, n * epoch_steps) for n in (before, config.epochs))
    was, now = (f"{100 * share:.0f} %" for share in shares)
    if was == now:
        return []
    return [
        f"NOTE: {config.epochs} epochs instead of {before}: the learning rate goes on at {now} of "
        f"its peak, which would have been at {was}"
    ]


def of_contraction(config: TrainConfig) -> str:
    """Of a radius that has run away from the gap."""
    near = config.support == "sphere" and config.beta >= 1
    lowest = lowest_contraction(config)
    return (
        f"NOTE: for {REVERSED_STEPS} steps most pairs have had a radius R beyond {1 - lowest:g} "
        "times their gap r: the factor 1 - R/r on the push of the negatives is below "
        f"{lowest:g}, so it is turned round instead of shrunk. Remedy: "
        + "--support sphere and --beta 1 keep R near r, " * (not near)
        + "--radius-bound gap with --radius-init 0.9 keeps it below"
    )
