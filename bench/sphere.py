"""What it costs to put the support vectors back on the sphere, on a CPU.

    python -m bench.sphere [--threads 1] [--rounds 31] [--out FILE]

Forward and backward with `renormalize` and without, in turns: the median of the rounds' ratios.
"""

import statistics
from typing import Any

import torch

from . import gate, timer
from .cases import Case
from .inputs import leaves_of, make_inputs
from .machine import arguments, environment, write_json
from .peers import PEERS

MODES = ("one-sided", "mirror", "siglip")
SIZES, D = (24, 64, 256, 1024, 4096), 512
SAMPLE_MS = 20.0


def measure(N: int, free: str, rounds: int) -> dict[str, Any]:
    samplers, sphere = {}, f"{free}-sphere"
    for mode in (free, sphere):
        case = Case(mode, N, D)
        loss = PEERS["ours"].build(mode)
        gate.check(mode, loss, case)
        step = timer.Step(loss, leaves_of(make_inputs(case)))
        samplers[mode] = timer.wall_sampler(step.both, SAMPLE_MS)
    times_ms = timer.interleave(samplers, rounds)
    ratios = [y / x for x, y in zip(times_ms[free], times_ms[sphere], strict=True)]
    return {
        "mode": free, "N": N, "D": D, "free_ms": round(statistics.median(times_ms[free]), 4),
        "sphere_over_free": round(statistics.median(ratios), 3),
    }  # fmt: skip


def main() -> None:
    parser = arguments("bench.sphere", __doc__, 31)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = []
    for N in SIZES:
        for mode in MODES:
            rows.append(measure(N, mode, chosen.rounds))
            print(rows[-1], flush=True)
    if chosen.out:
        write_json(chosen.out, {"machine": environment(), "cases": rows})


if __name__ == "__main__":
    main()
