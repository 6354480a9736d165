"""Batches in which rows have no negative that counts: hidden by equal ids, or weighted 0."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import supclap_kernels as sk
from supclap_kernels.testing import (
    DIFFERENTIABLE,
    Case,
    Inputs,
    Outputs,
    baseline,
    evaluate,
    floors,
    make_inputs,
    truth,
    violations,
)

Change = Callable[[Inputs], Inputs]


def weighted(*zero: Any) -> Change:
    """Weights of 0 in some rows, or all."""

    def change(inputs: Inputs) -> Inputs:
        weight = torch.linspace(0.5, 1.5, len(inputs.audio), device="cpu")
        for rows in zero:
            weight[rows] = 0.0
        return replace(inputs, weight=weight.to(inputs.logit_scale.dtype))

    return change


def identified(groups: int, alone: int = 0) -> Change:
    """Rows in `groups` groups of equal ids, and the first `alone` with an id of their own."""

    def change(inputs: Inputs) -> Inputs:
        ids = torch.arange(len(inputs.audio)) % groups
        ids[:alone] = 1000 + torch.arange(alone)
        return replace(inputs, ids=ids)

    return change


def nothing_left(inputs: Inputs) -> Inputs:
    return weighted(slice(None))(identified(1)(inputs))


HIDDEN: dict[str, Change] = {
    "all one id": identified(1),
    "two ids": identified(2),
    "one row alone": identified(1, alone=1),
    "no weight": weighted(slice(None)),
    "weight of some rows": weighted(slice(0, None, 3)),
    "no weight but for a row": lambda inputs: weighted(slice(1, None))(identified(2)(inputs)),
    "neither": nothing_left,
}
MODES = list(itertools.product(("infonce", "siglip"), ("none", "mirror", "shared")))
KINDS = list(
    itertools.product(("scalar", "row", "none"), (0.5, 1e-3), (False, True), ("mean", "none"))
)
"""Radius, gap, renormalize and reduction: one after the other."""


def cases(
    dtype: torch.dtype, sizes: tuple[int, ...], scale: float = 1 / 0.07
) -> Iterator[tuple[Case, Inputs, str]]:
    """Every mode with every way of hiding."""
    every = itertools.product(sizes, MODES, HIDDEN)
    for (N, mode, name), kind in zip(every, itertools.cycle(KINDS), strict=False):
        (objective, bilateral), (radius, gap, renormalize, reduction) = mode, kind
        options = {
            "objective": objective, "bilateral": bilateral, "renormalize": renormalize,
            "reduction": reduction, "beta": 0.3,
        }  # fmt: skip
        gap = max(gap, 0.05) if dtype == torch.float16 else gap  # its range
        case = Case(N=N, D=12, dtype=dtype, scale=scale, radius=radius, gap=gap, options=options)
        yield case, HIDDEN[name](make_inputs(case)), name


def judged(case: Case, inputs: Inputs, result: Outputs) -> list[str]:
    """What is not finite, or not the float64 gradient of the specification."""
    exact, narrow = truth(case, inputs), case.dtype in (torch.bfloat16, torch.float16)
    floor = floors(case, inputs, exact)
    if narrow:  # so few numbers do not show what rounding the result costs
        for name in ("audio", "text"):
            floor[name] += torch.finfo(case.dtype).eps / 2 * float(exact[name].abs().max())
    return violations(result, exact, baseline(case, inputs, narrow), floor)


def faults(
    backend: str, dtype: torch.dtype, sizes: tuple[int, ...], scale: float = 1 / 0.07
) -> list[str]:
    found = []
    for case, inputs, name in cases(dtype, sizes, scale):
        result = evaluate(sk.fused_svr_loss, inputs, backend=backend, **case.options)
        found += [f"{case}, {name}: {line}" for line in judged(case, inputs, result)]
    return found


def wrong_statistics(backend: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Values of SVRStats that are not those of the specification in float64."""
    found = []
    for case, inputs, name in cases(dtype, (1, 9)):
        values = []
        for x, given in ((inputs, backend), (inputs.to(torch.float64), "reference")):
            arguments = (getattr(x, field) for field in DIFFERENTIABLE)
            options = {**case.options, "return_stats": True, "backend": given}
            loss = sk.fused_svr_loss(*arguments, ids=x.ids, weight=x.weight, **options)
            values.append(torch.stack(loss[1]).double())
        alike = torch.equal(*(x.isnan() for x in values))
        ours, theirs = (x.nan_to_num() for x in values)
        if not alike or bool(((ours - theirs).abs() > 3e-6 * theirs.abs().clamp_min(1.0)).any()):
            found.append(f"{case}, {name}: {values}")
    return found
