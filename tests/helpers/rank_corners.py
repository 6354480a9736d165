"""What the ranks of a group do in the tests of tests/distributed/test_distributed_corners.py."""

import gc
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import model, parts
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import supclap_kernels as sk
from supclap_kernels import collectives, radius
from supclap_kernels.integrations import open_clip, sentence_transformers


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)


def pair(N: int, D: int = 8) -> tuple[Tensor, Tensor]:
    """audio, text: the same on every rank."""
    generator = torch.Generator().manual_seed(2)
    audio, text = torch.randn(2, N, D, generator=generator).unbind()
    return audio, text


def gradients(audio: Tensor, text: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaves = [x.clone().requires_grad_() for x in (audio, text)]
    dA, dT = torch.autograd.grad(sk.fused_svr_loss(*leaves, 0.3, normalize=True, **options), leaves)
    return dA, dT


def subgroup(rank: int, world: int, exchange: str) -> float:
    """A group whose ranks are not 0, 1, ..."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return 0.0
    audio, text = pair(14)
    wanted, part = gradients(audio, text), parts(14, 2)[rank - 1]
    found = gradients(audio[part], text[part], group=group, exchange=exchange)
    return max(error(x / 2, y[part]) for x, y in zip(found, wanted, strict=True))


def frozen_on_one_rank(rank: int, world: int, exchange: str) -> float:
    """Rank 0 has a frozen audio tower; the others' gradients are what they were."""
    audio, text = pair(13)
    wanted, part = gradients(audio, text), parts(13, world)[rank]
    own = [x[part].clone() for x in (audio, text)]
    own[0].requires_grad_(rank != 0)
    own[1].requires_grad_()
    options: dict[str, Any] = {"group": dist.group.WORLD, "exchange": exchange, "normalize": True}
    sk.fused_svr_loss(*own, 0.3, **options).backward()
    assert (own[0].grad is None) == (rank == 0)
    pairs = zip(own, wanted, strict=True)
    return max(error(x.grad / world, y[part]) for x, y in pairs if x.grad is not None)


def negatives_learned_on_one_rank(rank: int, world: int, backend: str) -> float:
    """Those of rank 1 alone want a gradient: the sum of what every rank's rows give."""
    (audio, text), (rows, _) = pair(13), pair(6)
    part, mine = parts(13, world)[rank], parts(6, world)[rank]
    leaf = rows.clone().requires_grad_()
    options: dict[str, Any] = {"normalize": True, "radius": 0.3}
    sk.fused_svr_loss(audio, text, negatives=sk.Negatives(text=leaf), **options).backward()
    own = rows[mine].clone().requires_grad_(rank == 1)
    more = {"negatives": sk.Negatives(text=own), "group": dist.group.WORLD, "backend": backend}
    loss = sk.fused_svr_loss(audio[part], text[part].clone().requires_grad_(), **more, **options)
    loss.backward()
    assert (own.grad is None) == (rank != 1)
    return 0.0 if own.grad is None else error(own.grad / world, leaf.grad[mine])


def alive() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    found = {}
    for x in gc.get_objects():
        if isinstance(x, Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(found.values())


def held_after_backward(rank: int, world: int, exchange: str) -> int:
    """Bytes beyond the gradients, with the loss still there."""
    torch.manual_seed(rank)
    rows = [torch.randn(200, 64, requires_grad=True) for _ in range(2)]
    before = alive()
    loss = sk.fused_svr_loss(*rows, 0.1, group=dist.group.WORLD, exchange=exchange)
    loss.backward()
    return alive() - before - sum(x.numel() * 4 for x in rows)


DISAGREEING: dict[str, tuple[Any, Any]] = {
    "alpha": (0.3, 0.4),
    "beta": (0.0, 0.1),
    "bilateral": ("mirror", "none"),
    "exchange": ("gather", "ring"),
    "normalize": (False, True),
    "renormalize": (False, True),
    "ids": (None, torch.arange(4)),
    "weight": (None, torch.ones(4)),
    "radius": (0.1, torch.full((4,), 0.1)),
    "backend": ("cpu", "reference"),
    "return_stats": (False, True),
    "negatives": (None, sk.Negatives(text=torch.ones(2, 8))),
}


def disagree(rank: int, world: int, backend: str) -> dict[str, str]:
    """What this rank is told of each option in which the ranks differ."""
    said = {}
    for name, values in DISAGREEING.items():
        given = {"backend": backend, "radius": 0.1, name: values[rank]}
        try:
            sk.fused_svr_loss(*pair(4), group=dist.group.WORLD, **given)
        except (TypeError, ValueError, RuntimeError) as problem:
            said[name] = str(problem)
        else:
            said[name] = "no error"
    return said


def cached_data_parallel(rank: int, world: int) -> float:
    """cached_step with towers in DistributedDataParallel: gradients of one process."""
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(21, 12, generator=generator)
    text = torch.randn(21, 10, generator=generator)
    alone, own = model("static", None), model("static", dist.group.WORLD)
    alone(audio, text).backward()
    part = parts(21, world)[rank]
    towers = [DistributedDataParallel(tower) for tower in (own.audio, own.text)]
    loss = lambda a, t: own.loss(a, t, own.scale)  # noqa: E731
    sk.cached_step(towers, (audio[part], text[part]), loss, 2)
    names = ("audio", "text")
    return max(
        error(x.grad, y.grad)
        for name in names
        for x, y in zip(getattr(own, name).parameters(), getattr(alone, name).parameters(),
                        strict=True)
    )  # fmt: skip


def radius_over_ranks(rank: int, world: int, features: str) -> float:
    """A dynamic radius computed some rows at a time; its scale's gradient without DDP."""
    radius.CHUNK_BYTES = 22 * 4 * 2  # two rows
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(22, 12, generator=generator)
    text = torch.randn(22, 10, generator=generator)
    alone, own = model(features, None), model(features, dist.group.WORLD)
    alone(audio, text).backward()
    part = parts(22, world)[rank]
    own(audio[part], text[part]).backward()
    errors = [error(own.scale.grad, alone.scale.grad)]  # type: ignore[arg-type]
    for x, y in zip(own.parameters(), alone.parameters(), strict=True):
        if x.ndim and x is not own.bias:
            assert x.grad is not None and y.grad is not None
            mean = collectives.mean_over_ranks(x.grad, dist.group.WORLD)
            errors.append(error(mean, y.grad))
    return max(errors)


def siglip_with_a_radius(rank: int, world: int) -> float:
    """open_clip's SigLIP over ranks, one-sided: the texts move, value and gradients."""
    audio, text = (nn.functional.normalize(x, dim=1) for x in pair(12))
    part = slice(4 * rank, 4 * rank + 4)
    scale, bias = torch.tensor(9.0), torch.tensor(-3.0)
    results = []
    for rows, given in (((audio, text), {}), ((audio[part], text[part]), {"rank": rank})):
        leaves = [x.clone().requires_grad_() for x in rows]
        over = {"world_size": world if given else 1, **given}
        loss = open_clip.SigLipLoss(radius=sk.StaticRadius(0.4), bilateral="none", **over)
        value = loss(*leaves, scale, bias)
        value.backward()
        results.append((value.detach(), [x.grad for x in leaves]))
    (wanted, whole), (value, own) = results
    errors = [error(collectives.mean_over_ranks(value, dist.group.WORLD), wanted)]
    errors += [error(x / world, y[part]) for x, y in zip(own, whole, strict=True)]
    return max(errors)


class Columns(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["x"]}


def sentences_over_ranks(rank: int, world: int) -> float:
    anchors, positives = pair(12)
    part = slice(4 * rank, 4 * rank + 4)
    adapter = sentence_transformers.MultipleNegativesSymmetricRankingLoss
    errors, whole = [], [x.clone().requires_grad_() for x in (anchors, positives)]
    adapter(Columns())([{"x": x} for x in whole]).backward()
    own = [x[part].clone().requires_grad_() for x in (anchors, positives)]
    adapter(Columns(), gather_across_devices=True)([{"x": x} for x in own]).backward()
    for x, y in zip(own, whole, strict=True):
        assert x.grad is not None and y.grad is not None
        errors.append(error(x.grad / world, y.grad[part]))
    return max(errors)
