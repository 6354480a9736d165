"""One case on every rank of a group, put together to what one process computes."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from supclap_kernels import fused_svr_loss
from supclap_kernels.testing import (
    DIFFERENTIABLE,
    Case,
    Inputs,
    Outputs,
    baseline,
    floors,
    make_inputs,
    truth,
    violations,
)


def parts(N: int, world: int) -> list[slice]:
    """Uneven numbers of rows, one at least."""
    shares = [n + 1 for n in range(world)]
    ends = [N * sum(shares[: n + 1]) // sum(shares) for n in range(world)]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def own_rows(inputs: Inputs, part: slice) -> Inputs:
    cut = {
        name: x[part] if isinstance(x, Tensor) and x.ndim else x for name, x in vars(inputs).items()
    }
    return Inputs(**cut)


def evaluate(case: Case, group: Any, backend: str, **more: Any) -> Outputs:
    """Loss and gradients of the whole batch, from all ranks; in the single process' scale."""
    world, rank = group.size(), group.rank()
    rows = parts(case.N, world)
    inputs = own_rows(make_inputs(case), rows[rank])
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
    arguments = (leaves.get(name) for name in DIFFERENTIABLE)
    loss = fused_svr_loss(
        *arguments, ids=inputs.ids, weight=inputs.weight, group=group, backend=backend,
        **{**case.options, **more},
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, list(leaves.values()), inputs.upstream.to(loss.dtype))
    found = {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}
    per_row = case.options.get("reduction") == "none"
    whole: Outputs = {}
    for name, x in found.items():
        if x.ndim:  # rows
            every: list[Any] = [None] * world
            dist.all_gather_object(every, x, group=group)
            whole[name] = torch.cat(every)
            # The derivative of the sum of what the ranks return.
            whole[name] = whole[name] / (1 if per_row or name == "loss" else world)
        else:
            whole[name] = x * world if per_row else x
    return whole


def verdict(case: Case, group: Any, backend: str, **more: Any) -> list[str]:
    """Violations of the acceptance rule."""
    result = evaluate(case, group, backend, **more)
    inputs = make_inputs(case)
    exact = truth(case, inputs)
    base = baseline(case, inputs, case.dtype == torch.bfloat16)
    return violations(result, exact, base, floors(case, inputs, exact))


def suite(rank: int, world: int, cases: list[tuple[int, Case, str, dict[str, Any]]]) -> list[str]:
    """Every (ranks, case, backend, more) in the group of the first ranks."""
    groups = {n: dist.new_group(range(n)) for n in range(1, world + 1)}
    found = []
    for n, case, backend, more in cases:
        if rank < n:
            bad = verdict(case, groups[n], backend, **more)
            if bad:
                found.append("\n  ".join([f"{n} ranks, {backend} {more} {case}:", *bad]))
    return found


__all__ = ["replace", "suite"]
