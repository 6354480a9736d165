"""How long a step of the loss takes on a GPU that nobody has measured: a model.

Arithmetic and traffic are counted, and the card's numbers divide them (machine.py). What cannot be
counted comes from one H200 (bench/results/h200): the share of their peaks that products and copies
reach, the epilogues of panels, the products of the tile kernels and of the single launch, and the
work of the host, of which a third is taken, since that host was slow (an empty autograd Function
took it 151 microseconds). On the H200 itself the model is within 40 % of the measurements.
"""

import math
from typing import NamedTuple

import torch

from ..options import MIRROR, ONE_SIDED, PLAIN, SHARED, WORKSPACE
from . import tile_sizes
from .machine import CARDS, Machine
from .panel import Layout, Tiling, kept_elements

MARGIN = 1.5
"""Our kernels are chosen by the model where it says that they are so many times faster than eager
PyTorch: more than it errs."""
SHARE = 0.5
"""Eager PyTorch may take this share of the free memory; an optimizer's state comes later."""

PRODUCTS = 0.75
"""Share of their peak that the library's products reach."""
COPIES = 0.88
TILE_PRODUCTS = {PLAIN: 0.42, ONE_SIDED: 0.34, SHARED: 0.34, MIRROR: 0.30}
"""Share of the library's rate that the tile kernels reach, formulas and all; SigLIP: half of it."""
SINGLE_HALF, SINGLE_SINGLE = 0.04, 0.30
"""Share of the library's rate that the products of the single launch reach, in 16 bits and in
float32 (a guess: not measured alone)."""
SINGLE_START = 40e-6
"""Seconds of its barriers and launches."""
EPILOGUE = {PLAIN: 14e-12, ONE_SIDED: 27e-12, SHARED: 27e-12, MIRROR: 40e-12}
"""Seconds that an H200 spends on one pair in the epilogues of panels."""
EAGER_HOST, SINGLE_HOST, SWEEPS_HOST = 160e-6, 180e-6, 1170e-6
"""Seconds of the host: eager PyTorch for each direction, one launch (`bench.host`: it was changed
since), panels or tiles."""
VISIT_HOST = {"cuda:panel": 130e-6, "triton:panel": 250e-6, "triton:tile": 130e-6}
"""... and for each tile pair that a sweep visits."""
EAGER_PASSES = {True: 24, False: 32}
"""Times that eager InfoNCE (True) or SigLIP reads or writes N x N numbers for each direction."""
EAGER_MATRICES = 4
"""N x N matrices that eager autograd holds for each direction: product, logits, hidden pairs,
softmax; and two of gradients for the whole."""


class Kind(NamedTuple):
    """Of a call, all that its speed depends on beside N."""

    D: int
    dtype: torch.dtype
    mode: int
    infonce: bool

    @property
    def grams(self) -> int:
        return {PLAIN: 0, ONE_SIDED: 1, SHARED: 1, MIRROR: 2}[self.mode]

    @property
    def directions(self) -> int:
        """Softmaxes (SigLIP: sums) that eager PyTorch takes over N x N logits."""
        support = {PLAIN: 0, ONE_SIDED: 1, SHARED: 2, MIRROR: 2}[self.mode]
        return 1 + self.infonce + support


def eager_bytes(N: int, directions: int) -> int:
    """Memory of eager PyTorch at its peak."""
    return (EAGER_MATRICES * directions + 2) * N * N * 4


def product_rate(machine: Machine, dtype: torch.dtype) -> float:
    """Flop a second of the library's products."""
    card = machine.card
    cycles = PRODUCTS * card.multiprocessors * card.clock
    if dtype.itemsize == 2:
        return cycles * card.half_flops
    return cycles * (card.half_flops / 2 if machine.tf32 else card.single_flops)


def eager_seconds(machine: Machine, N: int, kind: Kind) -> float:
    """Of `svr_loss_reference`, whose products are in float32."""
    rate, d = product_rate(machine, torch.float32), kind.directions
    products = 3 * d * 2.0 * N * N * kind.D / rate
    traffic = d * EAGER_PASSES[kind.infonce] * 4.0 * N * N / (COPIES * machine.card.bandwidth)
    return max(EAGER_HOST * d, products + traffic)


def slower_than_h200(machine: Machine) -> float:
    """In instructions a second."""
    h200, card = CARDS[9, 0], machine.card
    return h200.multiprocessors * h200.clock / (card.multiprocessors * card.clock)


def single_seconds(machine: Machine, N: int, kind: Kind) -> float:
    share = SINGLE_HALF if kind.dtype.itemsize == 2 else SINGLE_SINGLE
    rate = share * product_rate(machine._replace(tf32=False), kind.dtype)
    units = 3 + 1.5 * kind.grams
    start = SINGLE_START * slower_than_h200(machine)
    return max(SINGLE_HOST, start + units * 2.0 * N * N * kind.D / rate)


def sweeps_seconds(machine: Machine, way: str, N: int, kind: Kind) -> float:
    """Of panels, or of Triton's tile kernels."""
    tiles, grams = way == "triton:tile", kind.grams
    weight = kind.dtype.itemsize
    scratch = weight + 3 if tiles else 2 * (4 + weight + 3)
    tiling = Tiling(tile_sizes.GPU_TILE, tile_sizes.GPU_PAD, tile_sizes.GPU_PAD, scratch)
    side = Layout.choose(N, grams, tiling, WORKSPACE, 0, True).side
    across = math.ceil(N / side)
    sweeps = 2 if kind.infonce else 1
    host = SWEEPS_HOST + VISIT_HOST[way] * sweeps * across * (across + 1) / 2

    keeps = not tiles and kept_elements(N, grams, 4, tiling, WORKSPACE) > N * N
    logits = (1 if keeps else sweeps) * (1 + grams / 2)
    unit = 2.0 * N * N * kind.D / product_rate(machine, kind.dtype)
    gradient = (2 + grams) * unit
    if tiles:
        share = TILE_PRODUCTS[kind.mode] * (1 if kind.infonce else 0.5)
        return max(host, (logits * unit + gradient) / share)
    issue = EPILOGUE[kind.mode] * slower_than_h200(machine)
    traffic = (1 + grams / 2) * (12 + 3 * weight) / (COPIES * machine.card.bandwidth)
    return max(host, logits * unit + gradient + max(issue, traffic) * N * N)


def seconds(machine: Machine, way: str, N: int, kind: Kind) -> float:
    """Forward and backward of one step."""
    if way == "reference":
        return eager_seconds(machine, N, kind)
    if way == "cuda:single":
        return single_seconds(machine, N, kind)
    return sweeps_seconds(machine, way, N, kind)
