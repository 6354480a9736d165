"""Batches larger than memory: a contrastive step with the activations of one chunk at a time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Encoder = Callable[..., Tensor]


def cached_step(
    encoders: Sequence[Encoder],
    batch: Sequence[Any],
    loss: Callable[..., Tensor],
    chunk_size: int | Sequence[int],
    scaler: Any = None,
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
        batch: for each encoder its input, of N rows: a tensor, a tuple of positional or a dict of
            keyword arguments. Their tensors are cut along the first dimension; the rest passes.
        loss: embeddings (N, D), in the encoders' order, to a scalar, such as
            `lambda audio, text: criterion(audio, text, scale)`.
        chunk_size: rows encoded at a time; or one for each encoder.
        scaler: a torch.amp.GradScaler, which then scales the loss before backward.

    Returns:
        The loss, detached and unscaled.

    Raises:
        ValueError: as many encoders as inputs are needed, a chunk size of at least 1, and tensors
            of one length.
    """
    sizes = [chunk_size] * len(encoders) if isinstance(chunk_size, int) else list(chunk_size)
    if not len(encoders) == len(batch) == len(sizes):
        raise ValueError(
            f"one input and one chunk size for each encoder: got {len(encoders)} encoders, "
            f"{len(batch)} inputs, {len(sizes)} chunk sizes"
        )
    if min(sizes) < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    pieces = [list(chunks(given, size)) for given, size in zip(batch, sizes, strict=True)]
    states: list[list[RandomState]] = []
    leaves: list[Tensor] = []
    for encoder, parts in zip(encoders, pieces, strict=True):
        states.append([])
        outputs = []
        for part in parts:
            states[-1].append(RandomState(part))
            with torch.no_grad():
                outputs.append(called(encoder, part))
        leaves.append(torch.cat(outputs).requires_grad_(is_trained(encoder)))
    value = loss(*leaves)
    (value if scaler is None else scaler.scale(value)).backward()
    for encoder, parts, before, leaf in zip(encoders, pieces, states, leaves, strict=True):
        if leaf.grad is None:
            continue
        start = 0
        for n, (part, state) in enumerate(zip(parts, before, strict=True)):
            last = n == len(parts) - 1
            waits = not last and hasattr(encoder, "no_sync")
            with encoder.no_sync() if waits else contextlib.nullcontext():  # type: ignore[attr-defined]
                with state.again():
                    output = called(encoder, part)
                if output.requires_grad:
                    output.backward(leaf.grad[start : start + len(output)])
            start += len(output)
    return value.detach()


def is_trained(encoder: Encoder) -> bool:
    return not isinstance(encoder, nn.Module) or any(p.requires_grad for p in encoder.parameters())


def called(encoder: Encoder, part: Any) -> Tensor:
    if isinstance(part, dict):
        return encoder(**part)
    return encoder(*part) if isinstance(part, tuple) else encoder(part)


def tensors_of(given: Any) -> list[Tensor]:
    values = given.values() if isinstance(given, dict) else given
    found = [given] if isinstance(given, Tensor) else list(values)
    return [x for x in found if isinstance(x, Tensor)]


def chunks(given: Any, size: int) -> Iterator[Any]:
    """An encoder's input, `size` rows at a time."""
    lengths = {len(x) for x in tensors_of(given)}
    if len(lengths) != 1:
        raise ValueError(
            f"an encoder's tensors must have one length, the batch; got {sorted(lengths)}"
        )
    (N,) = lengths
    for start in range(0, N, size):
        cut = lambda x: x[start : start + size] if isinstance(x, Tensor) else x  # noqa: B023, E731
        if isinstance(given, dict):
            yield {name: cut(x) for name, x in given.items()}
        elif isinstance(given, Tensor):
            yield cut(given)
        else:
            yield tuple(cut(x) for x in given)


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
