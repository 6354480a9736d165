"""What a step allocates, as PyTorch's own allocator records it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Trace(NamedTuple):
    """Bytes allocated through PyTorch, relative to the start."""

    peak: int
    held: int
    """at the end"""
    largest: int
    """of one allocation"""


def traced(step: Callable[[], Any]) -> tuple[Trace, Any]:
    """Runs `step` and adds up the allocator's own events in order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = largest = 0
    for _, size in changes:
        held += size
        peak, largest = max(peak, held), max(largest, size)
    return Trace(peak, held, largest), result
