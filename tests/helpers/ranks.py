"""Processes of a gloo group, and what they do: `run(world, target, *arguments)`.

Each rank calls target(rank, world, *arguments).
"""

import contextlib
import datetime
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=60)


def work(rank: int, world: int, folder: str, target: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        found = target(rank, world, *arguments)
    except BaseException:
        Path(folder, f"error.{rank}").write_text(traceback.format_exc())
        raise
    Path(folder, f"result.{rank}").write_bytes(pickle.dumps(found))
    with contextlib.suppress(RuntimeError, ValueError):  # a test may have let one die, or the group
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads do not always survive the end of the interpreter


def run(world: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What every rank returned; None of one that ended without a word."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=work, args=(rank, world, folder, target, *arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error.*"))]
        assert not errors, "\n".join(errors)
        assert all(process.exitcode == 0 for process in processes)
        results = [Path(folder, f"result.{rank}") for rank in range(world)]
        return [pickle.loads(x.read_bytes()) if x.exists() else None for x in results]
