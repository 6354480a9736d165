"""What the ranks of a group do in the tests of tests/distributed/test_distributed.py."""

import functools
import os
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import supclap_kernels as sk
from supclap_kernels import collectives
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

Job = tuple[int, Case, str, dict[str, Any]]
"""ranks, case, backend, more options"""


def parts(N: int, world: int) -> list[slice]:
    """Uneven numbers of rows, one at least where there are enough."""
    shares = [n + 1 for n in range(world)]
    ends = [max(n + 1, N * sum(shares[: n + 1]) // sum(shares)) for n in range(world)]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def own_rows(inputs: Inputs, part: slice) -> Inputs:
    rows = lambda x: x[part] if isinstance(x, Tensor) and x.ndim else x  # noqa: E731
    return Inputs(**{name: rows(x) for name, x in vars(inputs).items()})


def own_negatives(inputs: Inputs, world: int, rank: int) -> dict[str, Tensor]:
    """Uneven numbers of them, and none on some ranks."""
    found = {}
    for name in ("audio_negatives", "text_negatives", "audio_ids", "text_ids"):
        x = getattr(inputs, name)
        if x is not None:
            found[name] = x[parts(len(x), world)[rank]]
    return found


def whole(x: Tensor, group: Any) -> Tensor:
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, x, group=group)
    return torch.cat(every)


def evaluate(case: Case, group: Any, backend: str, **more: Any) -> Outputs:
    return evaluate_rows(make_inputs(case), case, group, backend, **more)


def evaluate_rows(batch: Inputs, case: Case, group: Any, backend: str, **more: Any) -> Outputs:
    """Loss and gradients of all ranks' rows, and those of numbers times the number of ranks."""
    world, rank = group.size(), group.rank()
    inputs = own_rows(batch, parts(case.N, world)[rank])
    inputs = replace(inputs, **own_negatives(batch, world, rank))
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
    arguments = (leaves.get(name) for name in DIFFERENTIABLE)
    loss = sk.fused_svr_loss(
        *arguments, ids=inputs.ids, weight=inputs.weight, group=group, backend=backend,
        **case.options, **inputs.negatives(leaves), **more,
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, list(leaves.values()), inputs.upstream.to(loss.dtype))
    per_row = case.options.get("reduction") == "none"
    found: Outputs = {"loss": whole(loss.detach(), group) if per_row else loss.detach()}
    for name, gradient in zip(leaves, gradients, strict=True):
        found[name] = whole(gradient, group) if gradient.ndim else gradient * world
    return found


def expected(case: Case, world: int) -> Inputs:
    return summed(make_inputs(case), case, world)


def summed(inputs: Inputs, case: Case, world: int) -> Inputs:
    """Inputs whose single process has these gradients: the sum of what the ranks return."""
    if case.options.get("reduction") != "none":
        return replace(inputs, upstream=inputs.upstream * world)
    return inputs


def suite(rank: int, world: int, jobs: list[Job]) -> list[str]:
    """The acceptance rule for each job, in the group of the first ranks."""
    groups = {n: dist.new_group(range(n)) for n in range(1, world + 1)}
    failures = []
    for n, case, backend, more in jobs:
        if rank >= n:
            continue
        result = evaluate(case, groups[n], backend, **more)
        inputs = expected(case, n)
        exact, narrow = truth(case, inputs), case.dtype != torch.float32 and backend != "reference"
        base = baseline(case, inputs, narrow and case.dtype != torch.float64)
        bad = violations(result, exact, base, floors(case, inputs, exact))
        if bad:
            failures.append("\n  ".join([f"{n} ranks, {backend} {more} {case}:", *bad]))
    return failures


class Model(nn.Module):
    """Two encoders, a scale, a bias, and the loss."""

    def __init__(self, radius: nn.Module | None, **options: Any) -> None:
        super().__init__()
        self.audio, self.text = nn.Linear(12, 8), nn.Linear(10, 8)
        self.scale, self.bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-3.0))
        self.loss = sk.SVRLoss(radius, normalize=True, **options)

    def forward(self, audio: Tensor, text: Tensor) -> Tensor:
        bias = self.bias if self.loss.options["objective"] == "siglip" else self.bias.new_zeros(())
        given = bias if self.loss.options["objective"] == "siglip" else None
        loss = self.loss(self.audio(audio), self.text(text), self.scale, given)
        return loss + 0.0 * self.bias  # every parameter has a gradient


def model(radius: str, group: Any, **options: Any) -> Model:
    torch.manual_seed(0)
    made = {
        "static": lambda: sk.StaticRadius(0.3),
        "summary": lambda: sk.DynamicRadius(features="summary"),
        "similarities": lambda: sk.DynamicRadius(22),
    }[radius]()
    found = Model(made, group=group, **options)
    for parameter in found.parameters():  # the radius' last layer starts at zero
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.1)
    return found


def data_parallel(rank: int, world: int, radius: str, options: dict[str, Any]) -> list[float]:
    """Largest error of each parameter's gradient over its largest value, DDP against one process,
    for the first 1, 2, ... ranks."""
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(22, 12, generator=generator)
    text = torch.randn(22, 10, generator=generator)
    alone = model(radius, None, **options)
    alone(audio, text).backward()
    groups = {n: dist.new_group(range(n)) for n in range(1, world + 1)}
    errors = []
    for n, group in groups.items():
        if rank >= n:
            continue
        part = parts(22, n)[rank]
        own = model(radius, group, **options)
        parallel = DistributedDataParallel(own, process_group=group)
        parallel(audio[part], text[part]).backward()
        for x, y in zip(own.parameters(), alone.parameters(), strict=True):
            assert x.grad is not None and y.grad is not None
            scale = float(y.grad.abs().max()) or 1.0
            errors.append(float((x.grad - y.grad).abs().max()) / scale)
    return errors


def statistics(rank: int, world: int, case: Case) -> list[tuple[str, float, float]]:
    """Every value of SVRStats: of the group, and of one process."""
    inputs, group = make_inputs(case), dist.group.WORLD
    own = own_rows(inputs, parts(case.N, world)[rank])
    results = []
    for given, over in ((own, group), (inputs, None)):
        arguments = (getattr(given, name) for name in DIFFERENTIABLE)
        _, stats = sk.fused_svr_loss(
            *arguments, ids=given.ids, weight=given.weight, group=over, return_stats=True,
            **case.options,
        )  # fmt: skip
        results.append(stats)
    pairs = zip(sk.SVRStats._fields, *results, strict=True)
    return [(name, float(x), float(y)) for name, x, y in pairs]


def sent(rank: int, world: int, N: int, D: int, options: dict[str, Any]) -> int:
    """Bytes this rank sends to others in a step."""
    count = 0
    add = collectives.Mail._add

    def counted(self: Any, operation: Any, peer: int, x: Tensor) -> None:
        nonlocal count
        count += x.numel() * x.element_size() * (operation is dist.isend)
        add(self, operation, peer, x)

    collectives.Mail._add = counted  # type: ignore[method-assign]
    torch.manual_seed(rank)
    rows = [torch.randn(N // world, D, requires_grad=True) for _ in range(2)]
    loss = sk.fused_svr_loss(*rows, 0.1, normalize=True, group=dist.group.WORLD, **options)
    loss.backward()
    return count


def disagree(rank: int, world: int) -> list[str]:
    """What every rank is told when one of them calls with something else."""
    group, said = dist.group.WORLD, []
    calls: list[dict[str, Any]] = [
        {"audio": torch.randn(4, 8 + rank), "text": torch.randn(4, 8 + rank)},
        {"alpha": 1.0 + rank},
        {"objective": ("infonce", "siglip")[rank]},
        {"radius": (0.1, None)[rank]},
        {"text": torch.randn(4, 8) if rank == 0 else torch.randn(5, 8)},
        {"reduction": "mean" if rank == 0 else "average"},
    ]
    for changed in calls:
        given = {"audio": torch.randn(4, 8), "text": torch.randn(4, 8), "radius": 0.1, **changed}
        try:
            sk.fused_svr_loss(**given, group=group)
        except (TypeError, ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("no error")
    return said


def one_dies(rank: int, world: int) -> tuple[str, float]:
    start = time.monotonic()
    audio, text = torch.randn(2, 4, 8, requires_grad=True).unbind()
    loss = sk.fused_svr_loss(audio, text, 0.1, group=dist.group.WORLD)
    if rank == 1:
        os._exit(0)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


def again(rank: int, world: int, exchange: str) -> bool:
    """Backward twice, or of a recomputed loss, gives the same bits, and then holds nothing; no_grad
    works."""
    torch.manual_seed(rank)
    audio, text = torch.randn(9, 8, requires_grad=True), torch.randn(9, 8)
    options: dict[str, Any] = {"group": dist.group.WORLD, "exchange": exchange, "normalize": True}
    loss = sk.fused_svr_loss(audio, text, 0.1, **options)
    first, second = (torch.autograd.grad(loss, audio, retain_graph=True)[0] for _ in range(2))
    loss.backward()
    try:
        loss.backward()
    except RuntimeError as error:
        assert "second time" in str(error), error
    else:
        return False
    with torch.no_grad():
        same = bool(sk.fused_svr_loss(audio, text, 0.1, **options) == loss)
    call = functools.partial(sk.fused_svr_loss, **options)
    late = checkpoint(call, audio, text, 0.1, use_reentrant=False)
    third = torch.autograd.grad(late, audio)[0]
    return torch.equal(first, second) and torch.equal(first, third) and same


def gather_modes(rank: int, world: int, local: bool, objective: str) -> list[float]:
    """Errors of the open_clip adapters on this rank: value, and gradients averaged over ranks."""
    from supclap_kernels.integrations import open_clip

    generator = torch.Generator().manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(12, 8, generator=generator)) for _ in "it"]
    part = slice(4 * rank, 4 * rank + 4)
    own = [x[part].clone().requires_grad_() for x in rows]
    every = [x.clone().requires_grad_() for x in rows]
    scales = [torch.tensor(9.0, requires_grad=True) for _ in range(2)]
    given = {"rank": rank, "world_size": world}
    logits = scales[1] * every[0] @ every[1].t()
    if objective == "clip":
        ours = open_clip.ClipLoss(local_loss=local, gather_with_grad=True, **given)(*own, scales[0])
        labels = torch.arange(12)
        entropy = torch.nn.functional.cross_entropy
        terms = [entropy(x, labels, reduction="none") for x in (logits, logits.t())]
        values = (terms[0] + terms[1]) / 2
    else:
        ours = open_clip.SigLipLoss(**given)(*own, scales[0], torch.tensor(-3.0))
        signs = 2 * torch.eye(12) - 1
        values = -torch.nn.functional.logsigmoid(signs * (logits - 3.0)).sum(dim=1)
    is_local = local or objective == "siglip"
    wanted = values[part].mean() if is_local else values.mean()
    ours.backward()
    values.mean().backward()
    errors = [float((ours - wanted).detach().abs())]
    wholes = (every[0].grad, every[1].grad)
    for x, whole in zip(own, wholes, strict=True):
        assert x.grad is not None and whole is not None
        errors.append(float((x.grad / world - whole[part]).abs().max()))
    mean, alone = (x.grad for x in scales)
    assert mean is not None and alone is not None
    errors.append(float(collectives.mean_over_ranks(mean, dist.group.WORLD) - alone))
    return [abs(error) for error in errors]


def fully_sharded(rank: int, world: int) -> list[float]:
    """Largest error of the towers' gradients under FSDP2, over their largest value."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    generator = torch.Generator().manual_seed(1)
    audio, text = torch.randn(10, 12, generator=generator), torch.randn(10, 10, generator=generator)
    alone, own = model("static", None), model("static", dist.group.WORLD)
    alone(audio, text).backward()
    mesh = init_device_mesh("cpu", (world,))
    for tower in (own.audio, own.text):
        fully_shard(tower, mesh=mesh)
    part = parts(10, world)[rank]
    own(audio[part], text[part]).backward()
    errors = []
    for name in ("audio", "text"):
        for x, y in zip(getattr(own, name).parameters(), getattr(alone, name).parameters(),
                        strict=True):  # fmt: skip
            assert y.grad is not None
            error = (x.grad.full_tensor() - y.grad).abs().max()
            errors.append(float(error) / float(y.grad.abs().max()))
    return errors


def dtensors(rank: int, world: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    rows = distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)])
    try:
        sk.fused_svr_loss(rows, rows)
    except TypeError as error:
        return str(error)
    return "no error"
