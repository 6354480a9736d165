"""Correctness first: a peer that disagrees with the float64 specification gets no number.

The rule is `supclap_kernels.testing`'s, the one that the tests use. It needs a few N x N matrices
in float64, so above `DENSE` pairs the batch is a smaller one repeated `m` times. That has an exact
answer too: every row then meets each negative `m` times, so each InfoNCE direction grows by log m,
the gradient of a row is that of the small batch over m, and the gradients of radius and scale are
those of the small batch.
"""

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from supclap_kernels import testing

from .peers import Loss, Peer

DENSE = 4096
"""Largest batch whose truth is computed directly."""
SMALL = 1024
"""Batch that a larger one repeats."""
DIRECTIONS = {"none": 3, "mirror": 4, "shared": 4}
"""InfoNCE directions in the loss, by `bilateral`."""


class GateError(AssertionError):
    """A peer that computes something else."""


def case(peer: Peer, N: int, D: int) -> testing.Case:
    """The inputs and options of this peer, StaticSVR."""
    return testing.Case(N=N, D=D, dtype=getattr(torch, peer.dtype), options=dict(peer.options))


def copies_of(objective: str, N: int) -> int:
    """How many times the batch repeats a smaller one: 1 up to DENSE."""
    if N <= DENSE:
        return 1
    if N % SMALL or objective != "infonce":
        raise ValueError(f"above N = {DENSE}: InfoNCE only, N a multiple of {SMALL}; got {N}")
    return N // SMALL


def make_inputs(peer: Peer, N: int, D: int) -> testing.Inputs:
    """The batch that is checked and timed."""
    copies = copies_of(peer.objective, N)
    inputs = testing.make_inputs(case(peer, N // copies, D))
    if copies == 1:
        return inputs
    return replace(inputs, audio=inputs.audio.repeat(copies, 1), text=inputs.text.repeat(copies, 1))


@functools.lru_cache(maxsize=4)
def expected(
    objective: str, bilateral: str, dtype: str, N: int, D: int
) -> tuple[testing.Inputs, testing.Outputs, testing.Outputs, dict[str, float]]:
    """Inputs, truth, baseline and floor."""
    copies = copies_of(objective, N)
    peer = Peer("ours", objective, bilateral, dtype)
    small = case(peer, N // copies, D)
    small_inputs = testing.make_inputs(small)
    low = small.dtype in (torch.bfloat16, torch.float16)
    exact = testing.truth(small, small_inputs)
    base = testing.baseline(small, small_inputs, rounded_weights=low)
    if copies > 1:
        for result in (exact, base):
            result["loss"] = result["loss"] + DIRECTIONS[bilateral] * math.log(copies)
            for name in ("audio", "text"):
                result[name] = result[name].repeat(copies, 1) / copies
    inputs = make_inputs(peer, N, D)
    return inputs, exact, base, testing.floors(case(peer, N, D), inputs, exact)


def check(peer: Peer, loss: Loss, N: int, D: int) -> None:
    """Raise GateError unless `loss`, built from `peer`, agrees with the specification."""
    inputs, exact, base, floor = expected(peer.objective, peer.bilateral, peer.dtype, N, D)

    def called(*tensors: Tensor | None, ids: None, weight: None) -> Tensor:
        return loss(*(value for value in tensors if value is not None))

    found = testing.violations(testing.evaluate(called, inputs), exact, base, floor)
    found += [f"{name}: not informative" for name in testing.uninformative(exact, floor)]
    if found:
        raise GateError("\n  ".join([f"{peer.label} at N = {N}, D = {D}:", *found]))
