"""The batches that are checked and timed."""

from dataclasses import replace

import torch
from torch import Tensor

from supclap_kernels import testing

from .cases import MODES, Case

DENSE = 4096
"""Largest batch whose truth is computed directly."""
SMALL = 1024
"""Batch that a larger one repeats."""


def copies_of(case: Case) -> int:
    """How many times the batch repeats a smaller one: 1 up to DENSE."""
    if case.N <= DENSE:
        return 1
    if case.N % SMALL or MODES[case.mode].objective != "infonce":
        raise ValueError(f"above N = {DENSE}: InfoNCE only, N a multiple of {SMALL}; got {case.N}")
    return case.N // SMALL


def make_inputs(case: Case, device: str = "cpu") -> testing.Inputs:
    """A batch whose truth is known (gate.py): the tests', or one of theirs repeated."""
    copies = copies_of(case)
    inputs = testing.make_inputs(case.for_testing(case.N // copies), device)
    if copies == 1:
        return inputs
    return replace(inputs, audio=inputs.audio.repeat(copies, 1), text=inputs.text.repeat(copies, 1))


def make_large_inputs(case: Case, device: str = "cuda") -> testing.Inputs:
    """A batch of any size without equal rows: one of at most 4096 repeated, and noise."""
    inputs = testing.make_inputs(case.for_testing(min(case.N, 4096)), device)

    def enlarged(X: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        X = X.float().repeat(-(-case.N // len(X)), 1)[: case.N]
        X = X + 0.1 * torch.randn(X.shape, device=device, generator=generator) / case.D**0.5
        return torch.nn.functional.normalize(X, dim=1).to(case.torch_dtype)

    return replace(inputs, audio=enlarged(inputs.audio, 0), text=enlarged(inputs.text, 1))


def leaves_of(inputs: testing.Inputs) -> list[Tensor | None]:
    """audio, text, radius, scale and bias as a loss takes them, and autograd looks for them."""
    tensors = (getattr(inputs, name) for name in testing.DIFFERENTIABLE)
    return [None if x is None else x.detach().requires_grad_() for x in tensors]
