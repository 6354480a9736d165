"""A CUDA GPU, the one that is here or one that is only described, as the model of estimate.py sees
it."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import native
from . import available

OLDEST = (8, 0)
"""The first compute capability whose tensor cores take bfloat16."""
GIB = 2**30


class Card(NamedTuple):
    """A GPU's numbers, from its data sheet."""

    name: str
    multiprocessors: int
    clock: float
    """cycles a second"""
    half_flops: int
    """of dense 16-bit products with float32 sums, for each cycle and multiprocessor"""
    single_flops: int
    """of float32 arithmetic"""
    bandwidth: float
    """bytes of memory a second"""
    memory: int
    """bytes"""
    shared: int
    """bytes of shared memory that one block may have"""


CARDS = {
    (8, 0): Card("A100", 108, 1.41e9, 2048, 128, 2.04e12, 80 * GIB, 163 * 1024),
    (8, 6): Card("RTX A6000", 84, 1.80e9, 512, 256, 0.77e12, 48 * GIB, 99 * 1024),
    (8, 9): Card("RTX 4090", 128, 2.52e9, 512, 256, 1.01e12, 24 * GIB, 99 * 1024),
    (9, 0): Card("H200", 132, 1.83e9, 4096, 256, 4.80e12, 141 * GIB, 227 * 1024),
    (10, 0): Card("B200", 148, 1.90e9, 8192, 256, 8.00e12, 180 * GIB, 227 * 1024),
    (12, 0): Card("RTX 5090", 170, 2.41e9, 512, 256, 1.79e12, 32 * GIB, 99 * 1024),
}
"""One card of each compute capability: what a described machine has, and what a driver does not
tell. Where cards of one capability differ in products a cycle, the slower number."""


def card_of(capability: tuple[int, int]) -> Card:
    """Of this compute capability, or of the newest one before it."""
    return CARDS[max(known for known in CARDS if known <= max(capability, OLDEST))]


class Machine(NamedTuple):
    """A GPU, and what was built for it."""

    device: int | None
    """the index of the CUDA device; None: it is only described"""
    capability: tuple[int, int]
    card: Card
    cuda: bool
    """whether the kernels of csrc/cuda run there"""
    hopper: bool
    """... and those for Hopper"""
    triton: bool
    tf32: bool
    """whether PyTorch may round the operands of float32 products to TF32"""
    free: int
    """bytes of memory that nothing uses"""


def tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def card_at(index: int) -> Card:
    """The numbers of a device, from its driver where that tells them."""
    tells = torch.cuda.get_device_properties(index)
    card = card_of((tells.major, tells.minor))
    clock, bus = getattr(tells, "clock_rate", 0), getattr(tells, "memory_bus_width", 0)
    transfers = getattr(tells, "memory_clock_rate", 0)  # half of them, in thousands a second
    return card._replace(
        name=tells.name,
        multiprocessors=tells.multi_processor_count,
        clock=min(card.clock, 1e3 * clock) if clock else card.clock,  # what it keeps up
        bandwidth=250.0 * transfers * bus if transfers * bus else card.bandwidth,
        memory=tells.total_memory,
        shared=getattr(tells, "shared_memory_per_block_optin", card.shared),
    )


def device_index(device: torch.device) -> int:
    """Of a CUDA device; -1 on the host."""
    if device.type != "cuda":
        return -1
    return native.current_device() if device.index is None else device.index


def free_memory(index: int) -> int:
    """Bytes on a device that nothing uses, those that PyTorch keeps for later among them."""
    free = torch.cuda.mem_get_info(index)[0]
    return int(free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index))


def machine_at(index: int) -> Machine:
    """The CUDA device of this index."""
    return Machine(
        index, available.capability(index), card_at(index), available.cuda_on(index) == "ok",
        available.hopper(index) == "ok", available.triton() == "ok", tf32_allowed(),
        free_memory(index),
    )  # fmt: skip


def described(
    capability: tuple[int, int], built: Sequence[str] | None = None, memory: int | None = None
) -> Machine:
    """A machine that is not here: "cuda" and "triton" may be built (default: both), `memory` bytes
    are free (default: all of its card's)."""
    if not (isinstance(capability, tuple) and list(map(type, capability)) == [int, int]):
        raise TypeError(f"capability must be two numbers such as (8, 0), got {capability!r}")
    if isinstance(built, str) or not set(built or ()) <= {"cuda", "triton"}:
        raise ValueError(f"built is a list that may name 'cuda' and 'triton', got {built!r}")
    if memory is not None and memory < 0:
        raise ValueError(f"memory must not be negative, got {memory}")
    card, built = card_of(capability), ("cuda", "triton") if built is None else tuple(built)
    cuda = "cuda" in built
    return Machine(
        None, capability, card, cuda, cuda and capability == (9, 0), "triton" in built,
        tf32_allowed(), card.memory if memory is None else memory,
    )  # fmt: skip
