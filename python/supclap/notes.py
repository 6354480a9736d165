"""What a run tells its user that may not be expected of its settings."""

from __future__ import annotations

from .config import TrainConfig
from .corpus import Corpus
from .step import schedule

REVERSED, REVERSED_STEPS = -0.5, 50
"""Below this median contraction (R beyond 1.5 r), after so many steps, the user is told."""


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
    return (
        f"NOTE: for {REVERSED_STEPS} steps most pairs have had a radius R beyond {1 - REVERSED} "
        "times their gap r: the factor 1 - R/r on the push of the negatives is below "
        f"{REVERSED}, so it is turned round instead of shrunk. Remedy: "
        + "--support sphere and --beta 1 keep R near r, " * (not near)
        + "--radius-bound gap with --radius-init 0.9 keeps it below"
    )
