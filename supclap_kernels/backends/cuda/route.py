"""Which of the CUDA ways takes a call: one launch (single.py) where the batch fits on the chip,
beyond that the kernels for Hopper or panels (sweeps.py)."""

from ... import native
from ...options import PLAIN
from .. import available
from ..call import Route
from ..estimate import Kind
from ..machine import Machine
from . import single

TYPICAL_LIMIT = 960
"""Of a described GPU, where no CUDA kernels are compiled that could tell: the smallest of the cards
known, with support vectors at D = 512."""


def routes(index: int, kind: Kind, staged: bool) -> list[Route]:
    """The ways of backend="cuda" on the device `index`, smallest batches first.

    `staged`: a pass is called stage by stage (distributed.py), so it cannot be one launch.
    """
    large = Route("cuda:panel", None, "panels")
    if kind.dtype.itemsize == 2 and kind.mode != PLAIN and available.hopper(index) == "ok":
        large = Route("cuda:hopper", None, "the kernels for Hopper: support vectors in 16 bits")
    if staged:
        return [large]
    reason = "one launch, since the batch fits on the chip"
    return [Route("cuda:single", single.limit(*kind, index), reason), large]


def single_route(way: str, index: int, kind: Kind, reason: str) -> Route:
    """Of the one launch, asked for by name."""
    return Route(way, single.limit(*kind, index, single.side_of(way)), reason)


def single_limit(machine: Machine, kind: Kind) -> int:
    """The largest batch that one launch takes on this machine."""
    if machine.device is not None:
        return single.limit(*kind, machine.device)
    if native.load()[0] is None or not native.module().built_with_cuda:
        return TYPICAL_LIMIT
    chip = machine.card.multiprocessors, machine.card.shared
    return single.limit(*kind, chip=chip)
