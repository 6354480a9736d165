"""What ranks of a process group exchange: an agreement on the call, rows, and sums.

All gradients here follow one convention: on every rank, the gradient of its own rows is the
derivative of the sum over ranks of what they compute, and the gradient of a replicated number is
that derivative divided by the number of ranks. Averaged over ranks, as DistributedDataParallel
does, both give the gradient of the mean over ranks of what they compute.
"""

import contextlib
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .negatives import Negatives

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def device_of(group: Any) -> torch.device:
    """Where the group's collectives want small tensors."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_gather(x: Tensor, group: Any) -> list[Tensor]:
    """Tensors of one shape, rank after rank."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def as_integer(value: Any) -> int:
    """A plain value in 64 bits."""
    if isinstance(value, str):
        return zlib.crc32(value.encode())
    if isinstance(value, float):
        return int(struct.unpack("<q", struct.pack("<d", value))[0])
    return int(value)


def agree(group: Any, call: dict[str, Any], free: Sequence[str] = ()) -> list[dict[str, int]]:
    """What every rank says of its call, as integers. Raises on all ranks if one failed before it
    came here (`call` is empty), or if they differ in more than `free`.

    One small collective, whose result the host reads: ranks that disagreed would wait for each
    other without end.
    """
    names = list(call) if call else []
    length = 32
    layout = zlib.crc32(",".join(names).encode())  # backend="reference" says other things
    message = [1, layout, *map(as_integer, call.values())] if call else [0]
    vector = torch.tensor(message + [0] * (length - len(message)), device=device_of(group))
    every = [part.tolist() for part in all_gather(vector, group)]
    failed = [rank for rank, values in enumerate(every) if values[0] == 0]
    if not call:
        return []
    if failed:
        raise RuntimeError(
            f"group: the call failed on rank {failed[0]} before it could begin; see its own error"
        )
    if any(values[1] != layout for values in every):
        raise ValueError("group: ranks must agree on backend: on some it is 'reference'")
    calls = [dict(zip(names, values[2:], strict=False)) for values in every]
    for rank, values in enumerate(calls):
        for name in names:
            if name not in free and values[name] != calls[0][name]:
                raise ValueError(
                    f"group: ranks must agree on {name}, but rank 0 and rank {rank} differ; rank "
                    f"{dist.get_rank(group)} has {call[name]!r}"
                )
    return calls


def describe(
    audio: Tensor, text: Tensor, radius: Any, ids: Tensor | None, weight: Tensor | None,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """A call as `agree` compares it; "pairs" alone may differ."""
    dimensions = radius.ndim if isinstance(radius, Tensor) else 0
    return {
        "pairs": len(audio),
        "columns": audio.shape[1],
        "dtype": DTYPES.index(audio.dtype),
        "radius": -1 if radius is None else dimensions,
        "ids": ids is not None,
        "weight": weight is not None,
        **options,
    }


def described(negatives: Negatives | None) -> dict[str, bool]:
    """Which negatives a call has: on every rank the same kinds, of any number."""
    given = Negatives() if negatives is None else negatives
    return {f"negatives.{name}": x is not None for name, x in given._asdict().items()}


def learning(negatives: Negatives | None) -> dict[str, bool]:
    """Whether the negatives of a side want a gradient on this rank."""
    given = Negatives() if negatives is None else negatives
    recording = torch.is_grad_enabled()
    return {
        f"{side} negatives": recording and x is not None and x.requires_grad
        for side, x in (("audio", given.audio), ("text", given.text))
    }


LEARNING = tuple(learning(None))


def everybodys(
    negatives: Negatives | None, group: Any, of_ranks: list[dict[str, int]]
) -> Negatives | None:
    """The negatives of all ranks, one rank's after the other's, with their gradient, which all
    ranks add up where one wants it. `of_ranks`: what the ranks said of their calls."""
    if negatives is None:
        return None
    gathered: dict[str, Any] = {}
    for side in ("audio", "text"):
        rows, ids = negatives.of(side)
        if rows is not None:
            if any(rank[f"{side} negatives"] for rank in of_ranks) and not rows.requires_grad:
                rows = rows.detach().requires_grad_()
            _, (gathered[side], gathered[f"{side}_ids"]) = whole_batch(group, len(rows), rows, ids)
    return Negatives(**gathered)


@contextlib.contextmanager
def together(group: Any) -> Iterator[None]:
    """What fails on this rank before the ranks agree fails on all."""
    try:
        yield
    except Exception:
        if group is not None and dist.get_world_size(group) > 1:
            agree(group, {})
        raise


class Mail:
    """Tensors between ranks: `send` and `receive` are collected, `post` lets them go, `wait`
    returns when all have arrived. Both ends name them in the same order."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.operations: list[dist.P2POp] = []
        self.works: list[Any] = []
        self.alive: list[Tensor] = []

    def send(self, rank: int, x: Tensor) -> None:
        if x.numel():
            self._add(dist.isend, rank, x.contiguous())

    def receive(self, rank: int, shape: Sequence[int], like: Tensor) -> Tensor:
        x = like.new_empty(tuple(shape))
        if x.numel():
            self._add(dist.irecv, rank, x)
        return x

    def _add(self, operation: Any, rank: int, x: Tensor) -> None:
        peer = dist.get_global_rank(self.group, rank)
        self.operations.append(dist.P2POp(operation, x, peer, self.group))
        self.alive.append(x)

    def post(self) -> None:
        if self.operations:
            self.works = dist.batch_isend_irecv(self.operations)
        self.operations = []

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works, self.alive = [], []


class GatherRows(torch.autograd.Function):
    """Rows (N, ...) of all ranks from those of this one (n, ...); `sizes` are theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        parts = all_gather(padded, group)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        narrow = gradient.dtype.itemsize == 2  # sums over ranks are not rounded
        total = gradient.float() if narrow else gradient.contiguous()
        dist.all_reduce(total, group=ctx.group)
        own = total.split(ctx.sizes)[dist.get_rank(ctx.group)]
        return own.to(gradient.dtype), None, None


class Replicated(torch.autograd.Function):
    """A number that all ranks have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return mean_over_ranks(gradient, ctx.group), None


def mean_over_ranks(x: Tensor, group: Any) -> Tensor:
    total = x.double() if x.device.type == "cpu" else x.float()
    total = total.clone()
    dist.all_reduce(total, group=group)
    return (total / dist.get_world_size(group)).to(x.dtype)


def whole_batch(group: Any, count: int, *tensors: Any) -> tuple[list[int], list[Any]]:
    """How many rows each rank has, and the rows of all (N, ...) for those of this one (count, ...);
    0-d tensors are replicated, the rest passes as it is."""
    counted = torch.tensor([count], device=device_of(group))
    sizes = [int(part) for part in all_gather(counted, group)]
    batch = []
    for x in tensors:
        if isinstance(x, Tensor) and x.ndim:
            x = GatherRows.apply(x, sizes, group)
        elif isinstance(x, Tensor):
            x = Replicated.apply(x, group)
        batch.append(x)
    return sizes, batch


def over_group(
    loss: Callable[..., Any], group: Any, audio: Tensor, text: Tensor, radius: Any, k: Any, b: Any,
    ids: Tensor | None, weight: Tensor | None, negatives: Negatives | None = None, **options: Any,
) -> Any:  # fmt: skip
    """`loss` of all ranks' rows on each of them; with reduction="none" its own rows of it."""
    call = describe(audio, text, radius, ids, weight, **options) | described(negatives)
    of_ranks = agree(group, call | learning(negatives), free=("pairs", *LEARNING))
    beyond = {} if negatives is None else {"negatives": everybodys(negatives, group, of_ranks)}
    sizes, batch = whole_batch(group, len(audio), audio, text, radius, k, b, ids, weight)
    result = loss(*batch[:5], ids=batch[5], weight=batch[6], **beyond, **options)
    if options["reduction"] != "none":
        return result
    own_rows = lambda rows: rows.split(sizes)[group.rank()]  # noqa: E731
    return (own_rows(result[0]), result[1]) if options["return_stats"] else own_rows(result)
