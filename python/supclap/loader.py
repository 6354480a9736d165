"""Items of a dataset, prepared in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .errors import KILLED, UserError, explained


class ErrorsAsItems(Dataset[Any]):
    """A dataset whose UserErrors are items: a worker process would wrap them in its traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
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
    dataset: Any, order: Sequence[int] | None = None, workers: int = 0, pin: bool = False
) -> Iterator[Any]:
    """Yields items of a dataset, one by one, prepared in `workers` processes; draws no global
    random number."""
    numbers = range(len(dataset)) if order is None else order
    items = DataLoader(
        ErrorsAsItems(dataset),
        batch_size=None,
        sampler=numbers,
        num_workers=min(workers, len(numbers)),
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
