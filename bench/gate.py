"""Correctness first: a peer that disagrees with the float64 specification gets no number on a CPU,
and its violations beside the number on a GPU.

The rule is `supclap_kernels.testing`'s, the one that the tests use. It needs a few N x N matrices
in float64, so above `inputs.DENSE` pairs the batch is a smaller one repeated `m` times. That has an
exact answer too: every row then meets each negative `m` times, so each InfoNCE direction grows by
log m, the gradient of a row is that of the small batch over m, and the gradients of radius and
scale are those of the small batch.
"""

import functools
import math

import torch
from torch import Tensor

from supclap_kernels import testing

from .cases import Case
from .inputs import copies_of, make_inputs
from .peers import Loss

DIRECTIONS = {"infonce": 2, "one-sided": 3, "mirror": 4, "shared": 4}
"""InfoNCE directions in the loss."""


class GateError(AssertionError):
    """A peer that computes something else."""


@functools.lru_cache(maxsize=4)
def expected(
    case: Case, device: str
) -> tuple[testing.Inputs, testing.Outputs, testing.Outputs, dict[str, float]]:
    """Inputs, truth, baseline and floor."""
    copies = copies_of(case)
    small = case.for_testing(case.N // copies)
    small_inputs = testing.make_inputs(small, device)
    exact = testing.truth(small, small_inputs)
    base = testing.baseline(small, small_inputs, rounded_weights=small.dtype != torch.float32)
    if copies > 1:
        for outputs in (exact, base):
            outputs["loss"] = outputs["loss"] + DIRECTIONS[case.mode] * math.log(copies)
            for name in ("audio", "text"):
                outputs[name] = outputs[name].repeat(copies, 1) / copies
    inputs = make_inputs(case, device)
    return inputs, exact, base, testing.floors(case.for_testing(case.N), inputs, exact)


def violations(loss: Loss, case: Case, device: str = "cpu") -> list[str]:
    """Where `loss` disagrees with the specification of this case."""
    inputs, exact, base, floor = expected(case, device)

    def called(*tensors: Tensor | None, ids: None, weight: None) -> Tensor:
        return loss(*tensors)

    found = testing.violations(testing.evaluate(called, inputs), exact, base, floor)
    return found + [f"{name}: not informative" for name in testing.uninformative(exact, floor)]


def check(peer: str, loss: Loss, case: Case) -> None:
    """Raise GateError unless the loss, built by this peer, agrees with the specification."""
    if found := violations(loss, case):
        raise GateError("\n  ".join([f"{peer} at N = {case.N}, D = {case.D}:", *found]))
