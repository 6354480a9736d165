"""Batches and features, prepared in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .errors import KILLED, UserError, explained


class Items(Dataset[Any]):
    """What a function makes of its arguments. UserErrors are items as well: a worker process would
    wrap them in its traceback."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, argument: Any) -> Any:
        try:
            return self.function(argument)
        except UserError as error:
            return str(error)


def leave_signals_to_parent(worker: int) -> None:
    """Runs in a worker, which the parent ends, no Ctrl-C or SIGTERM that the whole job gets: the
    parent is in the middle of a step then, and the batch it waits for still comes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    parent = multiprocessing.parent_process()

    def end_when_the_parent_asks() -> None:
        while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=end_when_the_parent_asks, daemon=True).start()


def load_items(
    function: Callable[[Any], Any], arguments: Sequence[Any], workers: int = 0, pin: bool = False
) -> Iterator[Any]:
    """Yields what the function makes of each argument, prepared in `workers` processes; draws no
    global random number."""
    items = DataLoader(
        Items(function),
        batch_size=None,
        sampler=arguments,
        num_workers=min(workers, len(arguments)),
        pin_memory=pin,
        generator=torch.Generator(),
        worker_init_fn=leave_signals_to_parent if hasattr(signal, "sigwaitinfo") else None,
    )
    try:
        for item in items:
            if isinstance(item, str):
                raise UserError(item)
            yield item
    except RuntimeError as error:
        known = explained(error)
        if known is None:
            raise
        raise known from error
    except (ConnectionError, EOFError) as error:  # it was killed while it sent a batch
        raise UserError(KILLED.format(str(error) or "it hung up")) from error
