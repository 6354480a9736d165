"""Small batches on a CPU, beside the least they could take.

    python -m bench.small [--threads 1] [--rounds 21] [--isa avx2] [--compile] [--out FILE]
                          [--only mirror:24:1024 ...]

Forward and backward, in turns, each of ours checked against the specification first. The floor is a
Function that does nothing for the same tensors, and the pass's products alone by `torch.mm`: 3 of
N x N x D without support vectors, 4.5 with those of the texts, 6 with both.
"""

import statistics
from typing import Any

import torch

from supclap_kernels import native

from . import gate, timer
from .cases import MODES, Case
from .host import Nothing
from .inputs import leaves_of, make_inputs
from .machine import arguments, environment, write_json
from .peers import PEERS

CASES = [
    Case(mode, N, D)
    for N, D in ((24, 512), (24, 1024), (64, 512), (256, 512))
    for mode in ("infonce", "siglip-plain", "one-sided", "siglip", "mirror", "mirror-sphere")
]
SAMPLE_MS = 20.0


def products_of(case: Case) -> timer.Call:
    """Three products: the logits, and the weights with either embedding."""
    T, A = torch.randn(2, case.N, case.D)
    W, logits, gradient = (
        torch.randn(case.N, case.N),
        torch.empty(case.N, case.N),
        torch.empty_like(T),
    )

    def products() -> None:
        torch.mm(T, A.t(), out=logits)
        torch.mm(W, A, out=gradient)
        torch.mm(W.t(), T, out=gradient)

    return products


def measure(case: Case, names: list[str], rounds: int) -> dict[str, Any]:
    """Medians in microseconds, and the floor."""
    torch.compiler.reset()  # a case of its own, not one more recompilation
    present = [x for x in leaves_of(make_inputs(case)) if x is not None]
    calls: dict[str, timer.Call] = {
        "nothing": lambda: torch.autograd.grad(Nothing.apply(*present), present),
        "products": products_of(case),
    }
    for name in names:
        loss = PEERS[name].build(case.mode)
        if name.startswith("cpu"):
            gate.check(name, loss, case)
        calls[name] = timer.Step(loss, leaves_of(make_inputs(case))).both
    samplers = {name: timer.wall_sampler(call, SAMPLE_MS) for name, call in calls.items()}
    times_ms = timer.interleave(samplers, rounds)
    row: dict[str, Any] = {name: 1e3 * statistics.median(x) for name, x in times_ms.items()}
    row["floor"] = row["nothing"] + row["products"] * (3 + 1.5 * MODES[case.mode].grams) / 3
    return {name: round(value, 1) for name, value in row.items()}


def main() -> None:
    parser = arguments("bench.small", __doc__, 21)
    parser.add_argument("--isa", help="of our kernels, such as avx2; default the widest")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--only", nargs="+", help="cases, each MODE:N:D")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.isa:
        native.module().set_isa(chosen.isa)
    names = ["eager", *(["compile"] if chosen.compile else []), "open_clip", "cpu:panel"]
    cases = CASES
    if chosen.only:
        cases = [Case(x, int(N), int(D)) for x, N, D in (only.split(":") for only in chosen.only)]
    rows = []
    print("microseconds; ours over the floor, and over", ", ".join(names))
    for case in cases:
        there = [name for name in names if PEERS[name].state(case.mode) == "ok"]
        row = measure(case, [*there, "cpu:small"], chosen.rounds)
        rows.append({"mode": case.mode, "N": case.N, "D": case.D, **row})
        ours = row["cpu:small"]
        ratios = [f"{ours / row[name]:.2f}" if name in row else "-" for name in ("floor", *names)]
        print(f"{case.mode:13s} N={case.N:<4d} D={case.D:<5d} {ours:8.1f}  {'  '.join(ratios)}")
    if chosen.out:
        write_json(chosen.out, {"machine": environment(), "microseconds": rows})


if __name__ == "__main__":
    main()
