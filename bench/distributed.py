"""One loss step of W ranks against one process, both with one thread a process.

    python -m bench.distributed [--ranks 2] [--N 4096] [--D 512] [--out FILE]

Processes on this machine, gloo. In turns: all ranks with their N / W rows, then rank 0 alone with
all N. Median of the rounds, forward and backward; bytes are those a rank sends to others.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import supclap_kernels as sk

from .run import environment

ROUNDS, WARM_UP = 11, 2
MODES: dict[str, dict[str, Any]] = {
    "one-sided": {"bilateral": "none"},
    "mirror": {"bilateral": "mirror"},
    "siglip": {"objective": "siglip"},
}


def step(rows: list[torch.Tensor], **options: Any) -> float:
    start = time.perf_counter()
    loss = sk.fused_svr_loss(*rows, 0.1, backend="cpu", **options)
    torch.autograd.grad(loss, rows)
    return time.perf_counter() - start


def work(rank: int, world: int, store: str, N: int, D: int, out: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world,
        timeout=datetime.timedelta(minutes=10),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    whole = [torch.nn.functional.normalize(torch.randn(N, D, generator=generator)) for _ in "at"]
    share = slice(N * rank // world, N * (rank + 1) // world)
    own = [x[share].clone().requires_grad_() for x in whole]
    every = [x.requires_grad_() for x in whole]
    for name, mode in MODES.items():
        for exchange in ("gather", "ring"):
            group, alone = [], []
            for _ in range(WARM_UP + ROUNDS):
                dist.barrier()
                group.append(step(own, group=dist.group.WORLD, exchange=exchange, **mode))
                dist.barrier()
                if rank == 0:
                    alone.append(step(every, **mode))
            if rank == 0:
                ours, one = (statistics.median(x[WARM_UP:]) for x in (group, alone))
                row = {"mode": name, "exchange": exchange, "ranks": world, "N": N, "D": D}
                row |= {"group_ms": 1e3 * ours, "alone_ms": 1e3 * one, "ratio": ours / one}
                out.put(row)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        out.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--N", type=int, default=4096)
    parser.add_argument("--D", type=int, default=512)
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        out = context.Queue()
        arguments = (given.ranks, f"{folder}/store", given.N, given.D, out)
        processes = [context.Process(target=work, args=(n, *arguments)) for n in range(given.ranks)]
        for process in processes:
            process.start()
        while (row := out.get()) is not None:
            print(
                json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
            )
            rows.append(row)
        for process in processes:
            process.join()
    if given.out:
        with open(given.out, "w") as file:
            json.dump({**environment(), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
