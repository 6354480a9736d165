"""What the ranks do in tests/distributed/test_groups.py."""

import copy
import datetime
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import model, parts
from rank_corners import Columns, error, pair
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import supclap_kernels as sk
from supclap_kernels.collectives import mean_over_ranks
from supclap_kernels.integrations import laion_clap, open_clip, sentence_transformers

SECONDS = datetime.timedelta(seconds=60)


def adapters(rank: int, world: int) -> dict[str, nn.Module]:
    """Every module that takes ranks' rows together."""
    sentences = sentence_transformers.MultipleNegativesSymmetricRankingLoss
    over: dict[str, Any] = {"rank": rank, "world_size": world}
    return {
        "SVRLoss": sk.SVRLoss(sk.StaticRadius(), group="world"),
        "SVRLoss dynamic": sk.SVRLoss(sk.DynamicRadius(features="summary"), group="world"),
        "open_clip": open_clip.ClipLoss(**over),
        "open_clip local": open_clip.ClipLoss(True, **over),
        "SigLIP": open_clip.SigLipLoss(**over),
        "laion_clap": laion_clap.ClipLoss(**over),
        "sentence_transformers": sentences(Columns(), gather_across_devices=True),
    }


def value(module: Any, rank: int) -> Tensor:
    """Of this rank's rows, three of each."""
    audio, text = (nn.functional.normalize(x, dim=1)[3 * rank : 3 * rank + 3] for x in pair(9))
    if hasattr(module, "model"):
        found: Tensor = module([{"x": audio}, {"x": text}])
    else:
        found = module(audio, text, 9.0)
    return found.detach()


def built_early(rank: int, world: int, store: str) -> list[str]:
    """Modules that are older than the process group: which of them give something else."""
    dist.destroy_process_group()
    early = adapters(rank, world)
    alone = value(early["sentence_transformers"], rank)  # as the library: its own rows
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=SECONDS
    )
    late = adapters(rank, world)
    assert not torch.equal(alone, value(late["sentence_transformers"], rank))
    return [
        name for name in late if not torch.equal(*(value(x[name], rank) for x in (early, late)))
    ]


def saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    found: nn.Module = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    return found


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "AveragedModel": lambda module: AveragedModel(module).module,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


def copied(rank: int, world: int) -> list[str]:
    """Modules with the default group: which copies give something else, or show an address."""
    found = []
    every = adapters(rank, world)
    every["SVRLoss, the group itself"] = sk.SVRLoss(group=dist.group.WORLD)
    for name, module in every.items():
        wanted = value(module, rank)
        found += [
            f"{name} {way}"
            for way, copied in COPIES.items()
            if not torch.equal(value(copied(module), rank), wanted)
        ]
        found += [f"{name} {module}"] * (
            "object at" in repr(module) or "'world'" not in repr(module)
        )
    card = every["sentence_transformers"].get_config_dict()
    assert json.loads(json.dumps(card))["group"] == "world"
    return found


def subgroup(rank: int, world: int) -> tuple[list[str], bytes]:
    """Copies of a module with a group of some ranks; and the module as it is pickled."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return [], b""
    module, found = sk.SVRLoss(sk.StaticRadius(), group=group), []
    wanted = value(module, rank)
    assert "group='ranks 0, 2'" in repr(module) and module.group is group
    for way, copied in COPIES.items():
        other: Any = copied(module)
        try:
            same = torch.equal(value(other, rank), wanted)
        except ValueError as error:
            assert way in ("pickle", "torch.save") and "was not saved with it" in str(error)
            assert "group='not saved'" in repr(other)
            other = COPIES["deepcopy"](other)
            other.group = group
            same = torch.equal(value(other, rank), wanted)
        found += [] if same else [way]
    pickled = pickle.dumps(module)
    dist.destroy_process_group()
    assert "group='has ended'" in repr(module)
    return found, pickled


def misfits(rank: int, world: int) -> str:
    """Another number of ranks than the group has, found when the group is."""
    dist_rank = {"rank": rank, "world_size": world + 1}
    try:
        open_clip.ClipLoss(**dist_rank)
    except ValueError as error:
        return str(error)
    return ""


def misfits_later(rank: int, world: int, store: str) -> str:
    dist.destroy_process_group()
    loss = open_clip.ClipLoss(rank=rank, world_size=world + 1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=SECONDS
    )
    try:
        value(loss, rank)
    except ValueError as error:
        return str(error)
    return ""


def sharded_with_loss(rank: int, world: int, kind: str, wrapped: str) -> list[float]:
    """FSDP2 around a model with its loss: the largest error of each gradient, after two steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    audio, text = pair(22, 12)
    alone, own = model(kind, None), model(kind, dist.group.WORLD)
    for one in (alone, own):
        del one.scale, one.bias  # numbers of the test's model, which cannot be sharded
        one.scale, one.bias = 10.0, torch.zeros(())
        one.text = nn.Linear(12, 8)
        nn.init.eye_(one.text.weight)
        nn.init.zeros_(one.text.bias)
    mesh = init_device_mesh("cpu", (world,))
    parts_of = {"model": [], "loss": [own.loss], "radius": [own.loss.radius]}
    for module in (*parts_of[wrapped], own):
        fully_shard(module, mesh=mesh)
    part = parts(22, world)[rank]
    errors: list[float] = []
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01) for one in (alone, own)]
    for _ in range(2):
        alone(audio, text).backward()
        own(audio[part], text[part]).backward()
        for x, y in zip(own.parameters(), alone.parameters(), strict=True):
            assert y.grad is not None
            errors.append(error(x.grad.full_tensor(), y.grad))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return errors


def weighted_formula(
    audio: Tensor, text: Tensor, scale: Tensor, kappa: float, rows: slice
) -> Tensor:
    """laion_clap's weighted loss of some rows against all."""
    logits = scale * audio @ text.t()
    labels = torch.arange(len(audio))
    likeness = [((x @ x.t()).sum(dim=1) / (kappa * len(x))).exp().detach() for x in (audio, text)]
    terms = [
        nn.functional.cross_entropy(L[rows], labels[rows], weight=weight)
        for L, weight in ((logits, likeness[1]), (logits.t(), likeness[0]))
    ]
    return (terms[0] + terms[1]) / 2


def weighted_over_ranks(rank: int, world: int, local: bool, dtype: torch.dtype) -> list[float]:
    """laion_clap's weight_loss_kappa without mlp_loss: errors of the value and every gradient."""
    rows = [nn.functional.normalize(x, dim=1).to(dtype) for x in pair(12)]
    part = slice(4 * rank, 4 * rank + 4)
    own = [x[part].clone().requires_grad_() for x in rows]
    every = [x.float().requires_grad_() for x in rows]
    scales = [torch.tensor(9.0, requires_grad=True) for _ in range(2)]
    loss = laion_clap.ClipLoss(local, rank=rank, world_size=world, weight_loss_kappa=0.7)
    found = loss(*own, scales[0])
    shares = [slice(4 * n, 4 * n + 4) for n in range(world)] if local else [slice(None)]
    values = [weighted_formula(*every, scales[1], 0.7, share) for share in shares]
    wanted = values[rank] if local else values[0]
    found.backward()
    torch.stack(values).mean().backward()
    errors = [error(found.detach(), wanted.detach())]
    for x, whole in zip(own, every, strict=True):
        assert x.grad is not None and whole.grad is not None and x.grad.dtype == dtype
        errors.append(error(x.grad.float() / world, whole.grad[part]))
    ours, alone = (x.grad for x in scales)
    assert ours is not None and alone is not None
    return [*errors, error(mean_over_ranks(ours, dist.group.WORLD), alone)]
