"""Batches larger than memory: a contrastive step with the activations of one chunk at a time."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Encoder = Callable[..., Any]
GetRep = Callable[[Any], Tensor] | None


def cached_step(
    encoders: Sequence[Encoder],
    batch: Sequence[Any],
    loss: Callable[..., Tensor],
    chunk_size: int | Sequence[int],
    scaler: Any = None,
    get_rep: GetRep | Sequence[GetRep] = None,
) -> Tensor:
    """Forward and backward of a batch, encoded chunk by chunk (GradCache, arXiv 2101.06983).

    A contrastive loss needs all embeddings at once, but not all activations. Pass 1 encodes every
    chunk without a graph; the loss of the whole batch gives the gradient of each embedding; pass 2
    encodes each chunk again, with the random numbers of pass 1 (the same dropout masks), and
    carries that gradient into the encoder. Costs one more forward pass; parameters' gradients are
    those of the whole batch, accumulated into `.grad` as `backward` does. (Layers that mix a batch,
    such as BatchNorm in training, see chunks, and see them twice.)

    Args:
        encoders: one for each input, tensors or modules to embeddings (n, D). One wrapped in
            DistributedDataParallel reduces its gradients once, with its last chunk.
        batch: for each encoder its input, of N rows: a tensor, a tuple or list of positional
            arguments, or a mapping (a dict, a tokenizer's batch) of keyword arguments. Tensors in
            it, at any depth of tuples, lists and mappings, are cut along the first dimension; the
            rest passes, and so do tensors without dimensions.
        loss: embeddings (N, D), in the encoders' order, to a scalar, such as
            `lambda audio, text: criterion(audio, text, scale)`.
        chunk_size: rows encoded at a time; or one for each encoder.
        scaler: a torch.amp.GradScaler, which then scales the loss before backward.
        get_rep: the embeddings (n, D) in what an encoder returns, where that is no tensor, such as
            `lambda output: output.pooler_output`; or one for each encoder (None: it is a tensor).

    Returns:
        The loss, detached and unscaled.

    Raises:
        ValueError: as many encoders as inputs are needed, a chunk size of at least 1, and tensors
            of one length. TypeError: an encoder returned no tensor.
    """
    sizes = [chunk_size] * len(encoders) if isinstance(chunk_size, int) else list(chunk_size)
    if not len(encoders) == len(batch) == len(sizes):
        raise ValueError(
            f"one input and one chunk size for each encoder: got {len(encoders)} encoders, "
            f"{len(batch)} inputs, {len(sizes)} chunk sizes"
        )
    readers = list(get_rep) if isinstance(get_rep, Sequence) else [get_rep] * len(encoders)
    if len(readers) != len(encoders):
        raise ValueError(
            f"one get_rep, or one for each encoder: got {len(encoders)} encoders, {len(readers)} "
            "get_rep"
        )
    if min(sizes) < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    pieces = [
        list(chunks(n, rows, size)) for n, (rows, size) in enumerate(zip(batch, sizes, strict=True))
    ]
    towers = [Tower(n, *pair) for n, pair in enumerate(zip(encoders, readers, strict=True))]
    states: list[list[RandomState]] = []
    leaves: list[Tensor] = []
    for tower, parts in zip(towers, pieces, strict=True):
        states.append([])
        outputs = []
        for part in parts:
            states[-1].append(RandomState(part))
            with torch.no_grad():
                outputs.append(tower(part))
        leaves.append(torch.cat(outputs).requires_grad_(is_trained(tower.encoder)))
    value = loss(*leaves)
    (value if scaler is None else scaler.scale(value)).backward()
    for tower, parts, before, leaf in zip(towers, pieces, states, leaves, strict=True):
        if leaf.grad is None:
            continue
        encoder, start = tower.encoder, 0
        for n, (part, state) in enumerate(zip(parts, before, strict=True)):
            last = n == len(parts) - 1
            waits = not last and hasattr(encoder, "no_sync")
            with encoder.no_sync() if waits else contextlib.nullcontext():  # type: ignore[attr-defined]
                with state.again():
                    output = tower(part)
                if output.requires_grad:
                    output.backward(leaf.grad[start : start + len(output)])
            start += len(output)
    return value.detach()


def is_trained(encoder: Encoder) -> bool:
    return not isinstance(encoder, nn.Module) or any(p.requires_grad for p in encoder.parameters())


class Tower(NamedTuple):
    """An encoder, and how its embeddings are read from what it returns."""

    number: int
    encoder: Encoder
    get_rep: GetRep

    def __call__(self, part: Any) -> Tensor:
        if isinstance(part, Mapping):
            output = self.encoder(**part)
        else:
            output = self.encoder(*part) if isinstance(part, tuple | list) else self.encoder(part)
        rows = output if self.get_rep is None else self.get_rep(output)
        if not isinstance(rows, Tensor):
            what = "" if self.get_rep is None else "get_rep of "
            raise TypeError(
                f"{what}encoder {self.number} ({type(self.encoder).__name__}) returned "
                f"{type(rows).__name__}, but embeddings (n, D) are needed: pass get_rep=lambda "
                "output: ..., which takes them from what the encoder returns"
            )
        return rows


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Those with rows, at any depth."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(value)


def cut(batch: Any, rows: slice) -> Any:
    """The same with some rows of its tensors."""
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {name: cut(value, rows) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [cut(value, rows) for value in batch]
        named = isinstance(batch, tuple) and hasattr(batch, "_fields")
        return type(batch)(*values) if named else type(batch)(values)
    return batch


def chunks(number: int, batch: Any, size: int) -> Iterator[Any]:
    """The input of an encoder, `size` rows at a time."""
    lengths = {len(x) for x in tensors_of(batch)}
    if not lengths:
        raise ValueError(f"input {number} holds no tensors with rows, got {type(batch).__name__}")
    if len(lengths) != 1:
        raise ValueError(
            f"an encoder's tensors must have one length, the batch; got {sorted(lengths)}"
        )
    (N,) = lengths
    for start in range(0, N, size):
        yield cut(batch, slice(start, start + size))


class RandomState:
    """The random numbers to come, on the CPU and on the devices of an encoder's input."""

    def __init__(self, part: Any) -> None:
        self.devices = sorted({x.device.index or 0 for x in tensors_of(part) if x.is_cuda})
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
