"""`python -m bench.tune --out tiles.json`: on a GPU, time other blocks for the panel and tile
kernels; what is faster than the shipped ones by 2 % goes into the file.

Nothing is tuned in a user's step. To use the file: SUPCLAP_TILES=tiles.json.
"""

import argparse
import itertools
import json
from pathlib import Path

from . import inside, timer
from .cases import GPU_MODES, MODES, Case
from .inputs import leaves_of, make_large_inputs
from .inside import Blocks
from .peers import PEERS
from .timer import Step

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
GAIN = 0.98


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--N", type=int, default=16_384)
    parser.add_argument("--D", type=int, default=768)
    options = parser.parse_args()
    arch = inside.architecture()
    best: dict[str, Blocks] = {}
    inside.use_blocks(best)
    for (kernel, candidates), name in itertools.product(CANDIDATES.items(), GPU_MODES):
        tile, weights = kernel.startswith("tile"), kernel.endswith("weights")
        mode = MODES[name]
        infonce = mode.objective == "infonce"
        if not weights and not infonce:
            continue  # SigLIP has one sweep
        loss = PEERS["triton:tile" if tile else "triton:panel"].build(name)
        case = Case(name, options.N, options.D, "bfloat16")
        step = Step(loss, leaves_of(make_large_inputs(case)))
        call = step.both if weights else step.forward  # the sweep that the kernel is in
        key = f"{kernel} {mode.grams} {infonce} bfloat16 {arch}"
        least_ms = timer.median_event_ms(call)
        print(f"{key}: as shipped {least_ms:.3f} ms", flush=True)
        fastest = None
        for blocks in candidates:
            best[key] = blocks
            try:
                spent_ms = timer.median_event_ms(call)
            except (RuntimeError, ValueError) as error:  # too much shared memory, or no layout
                print(f"  {list(blocks)}: {str(error)[:80]}")
                continue
            if spent_ms < GAIN * least_ms:
                least_ms, fastest = spent_ms, blocks
                print(f"  {list(blocks)} {spent_ms:.3f} ms", flush=True)
        del best[key]
        if fastest is not None:
            best[key] = fastest
        options.out.write_text(json.dumps({k: list(v) for k, v in best.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
