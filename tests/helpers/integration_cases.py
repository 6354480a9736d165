"""Cases and helpers that the tests of the integration with PyTorch share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import supclap_kernels as sk
from supclap_kernels.testing import (
    Case,
    Inputs,
    Outputs,
    evaluate,
    make_inputs,
)

SMALL = 2**16
"""A workspace that holds the panels of small batches only."""


def same(x: Outputs, y: Outputs) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def fused(case: Case, inputs: Inputs, **options: Any) -> Outputs:
    return evaluate(sk.fused_svr_loss, inputs, **case.options, **options)


def leaves_of(inputs: Inputs) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in inputs.differentiable().values()]


def step_of(case: Case, stats: bool = False, **options: Any) -> Callable[..., Any]:
    names = list(make_inputs(case).differentiable())

    def step(leaves: list[Tensor], ids: Tensor | None, weight: Tensor | None) -> Any:
        arguments = dict(zip(names, leaves, strict=True))
        return sk.fused_svr_loss(
            **arguments, ids=ids, weight=weight, return_stats=stats, **case.options, **options
        )

    return step


OPTION_SETS: dict[str, Case] = {
    "infonce": Case(),
    "plain": Case(radius="none"),
    "rows": Case(radius="row", options={"beta": 0.1}),
    "none": Case(radius="row", options={"reduction": "none", "bilateral": "none"}),
    "shared": Case(options={"bilateral": "shared", "reduction": "sum"}),
    "siglip": Case(options={"objective": "siglip"}),
    "siglip rows": Case(radius="row", options={"objective": "siglip", "reduction": "none"}),
    "ids and weight": Case(radius="row", weighted=True, duplicates=True),
    "siglip ids and weight": Case(
        weighted=True, duplicates=True, options={"objective": "siglip", "bilateral": "shared"}
    ),
    "normalize": Case(options={"normalize": True}),
    "free": Case(radius="row", options={"renormalize": False}),
    "transposed": Case(layout="transposed"),
    "strided": Case(layout="strided", options={"normalize": True}),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float64": Case(dtype=torch.float64, radius="row", layout="transposed"),
    "recomputed": Case(N=150, options={"workspace": SMALL}),
}
every_option_set = pytest.mark.parametrize("case", OPTION_SETS.values(), ids=OPTION_SETS.keys())
