"""The errors that a user may see."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; the command line prints its text and no traceback."""

    exit_code = 2


class Exhausted(UserError):  # noqa: N818 (no fault of what was being read)
    """Memory ran out, or a process was killed."""


class Interrupted(UserError):  # noqa: N818 (stopping a run is no error)
    """The user stopped the run; what is on disk is complete and the text says where it is."""

    exit_code = 130


KILLED = (
    "a process that decodes audio was killed ({}): by hand, or since memory ran out; try fewer "
    "--workers"
)


def explained(error: BaseException) -> UserError | None:
    """Returns what a user can do about an error that any call may end in (no memory, a killed
    worker), or None for every other error."""
    text = str(error)
    memory = ("out of memory", "can't allocate memory", "Cannot allocate memory")
    if isinstance(error, MemoryError) or any(phrase in text for phrase in memory):
        return Exhausted(
            "out of memory; try a smaller --micro-batch-size, --batch-size or --max-seconds, "
            "--cache off, or fewer --workers"
        )
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return Exhausted(KILLED.format(text.strip()))
    return None
