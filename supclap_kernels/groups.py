"""Which process group is meant: looked up when it is needed, and no part of what is saved."""

from typing import Any

import torch.distributed as dist

WORLD = "world"
"""Names the default process group, which may be there later than what asks for it."""


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def looked_up(group: Any) -> Any:
    """The process group, or None; WORLD as it is now. ValueError where there is none yet."""
    if not isinstance(group, str):
        return group
    if group != WORLD:
        raise ValueError(f"group must be a process group, {WORLD!r} or None, got {group!r}")
    if not is_initialized():
        raise ValueError(
            "group='world' needs the default process group: call "
            "torch.distributed.init_process_group first, or set group to None for this process "
            "alone"
        )
    return dist.group.WORLD


class GroupHandle:
    """The process group of a module. Copies in this process share it. Of what is pickled it is no
    part: there the default group is looked up again, and another one must be set again.

    Args:
        group: None, "world" (the default group, at the time of each call), or a process group.
    """

    def __init__(self, group: Any = None) -> None:
        if group is not None and not isinstance(group, str) and not hasattr(group, "size"):
            raise TypeError(
                "group must be a torch.distributed process group that this rank is in, 'world' or "
                f"None, got {type(group).__name__}"
            )
        if isinstance(group, str) and group != WORLD:
            raise ValueError(f"group must be a process group, {WORLD!r} or None, got {group!r}")
        is_default = is_initialized() and group is dist.group.WORLD
        self.given, self.lost = WORLD if is_default else group, False

    def get(self) -> Any:
        """The process group, or None."""
        if self.lost:
            raise ValueError(
                "the process group of this module was not saved with it: set `group` of its "
                "SVRLoss to one that this rank is in, to 'world' for the default one, or to None "
                "for this process alone"
            )
        return looked_up(self.given)

    @property
    def name(self) -> str | None:
        """For a reader."""
        if self.lost:
            return "not saved"
        if self.given is None or isinstance(self.given, str):
            return self.given
        if not is_initialized():
            return "has ended"
        return "ranks " + ", ".join(map(str, dist.get_process_group_ranks(self.given)))

    def __repr__(self) -> str:
        return repr(self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupHandle":
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.given is None or isinstance(self.given, str):
            return {"given": self.given, "lost": self.lost}
        return {"given": None, "lost": True}
