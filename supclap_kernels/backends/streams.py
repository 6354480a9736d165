"""Two tiles in flight: while the library multiplies one, the kernels of another read and write.

The products are bound by the tensor cores and the epilogues by memory, so on two streams one hides
under the other. What is added up over tiles is added in the order of the tiles, behind events: the
result does not depend on timing. Everything is joined with the caller's stream before `in_flight`
returns, also after an exception, so the caching allocator may reuse what was allocated there.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from .panel import Tile

Scratch = TypeVar("Scratch")


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: the library keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream(device)


def in_flight(
    device: torch.device,
    tiles: Iterable[Tile],
    lanes: Sequence[Scratch],
    free: Callable[[Tile, Scratch], None],
    ordered: Callable[[Tile, Scratch], None],
) -> None:
    """For each tile `free`, then `ordered`; the tiles take turns with the lanes' scratch.

    `free` parts of neighbours may run at once, `ordered` ones follow one another.
    """
    if device.type != "cuda" or len(lanes) == 1:
        for n, tile in enumerate(tiles):
            free(tile, lanes[n % len(lanes)])
            ordered(tile, lanes[n % len(lanes)])
        return
    main = torch.cuda.current_stream(device)
    streams = (main, side_stream(device))
    streams[1].wait_stream(main)
    turn: torch.cuda.Event | None = None
    try:
        for n, tile in enumerate(tiles):
            stream = streams[n % 2]
            with torch.cuda.stream(stream):
                free(tile, lanes[n % 2])
                if turn is not None:
                    stream.wait_event(turn)
                ordered(tile, lanes[n % 2])
                turn = stream.record_event()
    finally:
        main.wait_stream(streams[1])
