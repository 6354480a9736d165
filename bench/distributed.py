"""One loss step of W ranks against one process, both with one thread a process.

    python -m bench.distributed [--ranks 2] [--N 4096] [--D 512] [--out FILE]

Processes on this machine, gloo. In turns: all ranks with their N / W rows, then rank 0 alone with
all N. Median of the rounds, forward and backward.
"""

import argparse
import datetime
import functools
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import supclap_kernels as sk

from .machine import environment, write_json
from .timer import wall_ms

ROUNDS, WARM_UP = 11, 2
MODES: dict[str, dict[str, Any]] = {
    "one-sided": {"bilateral": "none"},
    "mirror": {"bilateral": "mirror"},
    "siglip": {"objective": "siglip"},
}


def step(rows: list[torch.Tensor], **options: Any) -> None:
    torch.autograd.grad(sk.fused_svr_loss(*rows, 0.1, backend="cpu", **options), rows)


def work(rank: int, ranks: int, store: str, N: int, D: int, results: Any) -> None:
    """On every rank; rank 0 puts a row for each mode and exchange."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks,
        timeout=datetime.timedelta(minutes=10),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    whole = [torch.nn.functional.normalize(torch.randn(N, D, generator=generator)) for _ in "at"]
    share = slice(N * rank // ranks, N * (rank + 1) // ranks)
    shares = [x[share].clone().requires_grad_() for x in whole]
    whole = [x.requires_grad_() for x in whole]
    for (mode, options), exchange in itertools.product(MODES.items(), ("gather", "ring")):
        together = functools.partial(
            step, shares, group=dist.group.WORLD, exchange=exchange, **options
        )
        group, alone = [], []
        for _ in range(WARM_UP + ROUNDS):
            dist.barrier()
            group.append(wall_ms(together))
            dist.barrier()
            if rank == 0:
                alone.append(wall_ms(functools.partial(step, whole, **options)))
        if rank == 0:
            group_ms, alone_ms = (statistics.median(x[WARM_UP:]) for x in (group, alone))
            row = {"mode": mode, "exchange": exchange, "ranks": ranks, "N": N, "D": D}
            row |= {"group_ms": group_ms, "alone_ms": alone_ms, "ratio": group_ms / alone_ms}
            print(row, flush=True)
            results.put(row)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--N", type=int, default=4096)
    parser.add_argument("--D", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        arguments = (options.ranks, f"{folder}/store", options.N, options.D, results)
        mp.spawn(work, arguments, nprocs=options.ranks)
    if options.out:
        rows = [results.get() for _ in range(2 * len(MODES))]
        write_json(options.out, {**environment(), "rows": rows})


if __name__ == "__main__":
    main()
