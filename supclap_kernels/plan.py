"""Who computes what in a loss over a process group, without its tensors."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from .backends.call import Backend
from .collectives import mean_over_ranks
from .options import Options


class Visit(NamedTuple):
    """Rows `own` of a rank with rows `theirs` of another."""

    rank: int
    own: slice
    theirs: slice


def count(part: slice) -> int:
    return int(part.stop - part.start)


class Plan(NamedTuple):
    """One loss over a group, without its tensors."""

    options: Options
    group: Any
    """None: one process"""
    ring: bool
    sizes: tuple[int, ...]
    """rows of each rank"""
    needs: tuple[bool, ...]
    """which gradients are wanted, of the towers by any rank; then of the negatives"""
    backend: Backend

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def add_up(self, x: Tensor) -> Tensor:
        """Adds up what every rank has, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def mean(self, x: Tensor) -> Tensor:
        return x if self.group is None else mean_over_ranks(x, self.group)

    @property
    def steps(self) -> range:
        """In each, every rank visits another one, and is visited."""
        return range(1, len(self.sizes) // 2 + 1)

    @property
    def per_row(self) -> bool:
        return self.options.reduction == "none"

    @property
    def row_scale(self) -> float:
        return 1.0 / sum(self.sizes) if self.options.reduction == "mean" else 1.0

    def visit(self, rank: int, step: int) -> Visit:
        """Whom a rank visits."""
        sizes, other = self.sizes, (rank + step) % len(self.sizes)
        own, theirs = slice(0, sizes[rank]), slice(0, sizes[other])
        if 2 * step == len(sizes):  # both visit each other
            if rank < other:
                theirs = slice(0, sizes[other] // 2)
            else:
                own = slice(sizes[rank] // 2, sizes[rank])
        return Visit(other, own, theirs)

    def partners(self, step: int) -> tuple[Visit, int, Visit]:
        """This rank's visit; who visits this rank, and that visit."""
        guest = (self.rank - step) % len(self.sizes)
        return self.visit(self.rank, step), guest, self.visit(guest, step)
