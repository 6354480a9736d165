"""`python -m bench.tune --out tiles.json`: on a GPU, time other blocks for the panel and tile
kernels; what is faster than the shipped ones by 2 % goes into the file.

Nothing is tuned in a user's step. To use the file: SUPCLAP_TILES=tiles.json.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch

from supclap_kernels import fused_svr_loss
from supclap_kernels.backends import tiles
from supclap_kernels.backends.gpu_triton import architecture, kernel_blocks

from .gpu import MODES, leaves_of, timed

Blocks = tiles.Blocks
CANDIDATES = {
    "panel_statistics": [Blocks(i, 128, warps=w) for i in (16, 32, 64) for w in (4, 8)],
    "panel_weights": [Blocks(i, 128, warps=w) for i in (8, 16, 32) for w in (4, 8)],
    "tile_statistics": [
        Blocks(i, j, 64, w, s, p)
        for (i, j), w, s, p in itertools.product(
            ((64, 64), (128, 64), (64, 128), (128, 128)), (4, 8), (2, 3), (1, 2, 4)
        )
    ],
}
CANDIDATES["tile_weights"] = CANDIDATES["tile_statistics"]
ROUNDS, GAIN = 10, 0.98
GRAMS = {"infonce": 0, "one-sided": 1, "mirror": 2, "siglip": 1, "siglip-plain": 0}


def seconds(mode: str, backend: str, weights: bool, leaves: list[torch.Tensor]) -> float:
    """Median milliseconds of the sweep that the kernel is in: forward, or forward and backward."""
    objective, bilateral, plain = MODES[mode]
    options = {"objective": objective, "bilateral": bilateral, "backend": backend}
    arguments = [leaves[0], leaves[1], None if plain else leaves[2], *leaves[3:]]

    def step() -> None:
        loss = fused_svr_loss(*arguments, **options)
        if weights:
            torch.autograd.grad(loss, leaves[:2])

    for _ in range(3):
        step()
    return statistics.median(timed(step) for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--N", type=int, default=16_384)
    parser.add_argument("--D", type=int, default=768)
    given = parser.parse_args()
    dtype, arch = torch.bfloat16, architecture(torch.device("cuda"))
    best: dict[str, tiles.Blocks] = {}
    tiles.tuned = lambda: best
    for (kernel, candidates), mode in itertools.product(CANDIDATES.items(), MODES):
        backend = "panel" if kernel.startswith("panel") else "triton"
        weights, infonce = kernel.endswith("weights"), not mode.startswith("siglip")
        if not weights and not infonce:
            continue  # SigLIP has one sweep
        leaves = leaves_of(mode, given.N, given.D, dtype)
        key = f"{kernel} {GRAMS[mode]} {infonce} {str(dtype)[6:]} {arch}"
        least = seconds(mode, backend, weights, leaves)
        shipped = kernel_blocks(backend == "triton", weights, GRAMS[mode], infonce, dtype, arch)
        print(f"{key}: shipped {list(shipped)} {least:.3f} ms", flush=True)
        for block in candidates:
            before = best.get(key)
            best[key] = block
            try:
                found = seconds(mode, backend, weights, leaves)
            except (RuntimeError, ValueError) as error:  # too much shared memory, or no layout
                print(f"  {list(block)}: {str(error)[:80]}")
                found = float("inf")
            if found < GAIN * least:
                least = found
                print(f"  {list(block)} {found:.3f} ms", flush=True)
            elif before is None:
                del best[key]
            else:
                best[key] = before
        given.out.write_text(json.dumps({k: list(v) for k, v in best.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
