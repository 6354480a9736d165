"""Triton kernels that add the partial results of one tile pair to the running ones, in the order of
the slots. They serve the tile kernels (sweeps.py) and the panel's epilogues (panel.py)."""

import triton
import triton.language as tl

from .tile import HIDDEN, SIMILARITY, merge_pair


@triton.jit
def slots_at(start, slots, x, inside, count, SLOTS: tl.constexpr):
    """Of the rows x in SLOTS slots from `start` on: if they are there, and where in a plane."""
    slot = start + tl.arange(0, SLOTS)
    there = inside[None, :] & (slot < slots)[:, None]
    return there, slot.to(tl.int64)[:, None] * count + x[None, :]


@triton.jit(do_not_specialize=["slots", "count", "first", "N", "used"])
def merge_statistics(
    part,  # (5, 2, slots, count) float32: partial m, l
    running,  # (10, N) float32: m, l of each direction, sum and count of SIMILARITY; updated at
              # first .. first + count
    slots, count, first, N,
    used,  # bit d: direction d has partials
    INFONCE: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one tile's partial log-sum-exps (SigLIP: sums) to the running ones, SLOTS at once.

    The grid is (count / BLOCK, 5): one program owns its rows of a direction.
    """
    direction = tl.program_id(1)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (x < count) & ((used >> direction) % 2 == 1)
    at = running + 2 * direction.to(tl.int64) * N + first + x
    m, l = tl.load(at, mask=inside, other=0.0), tl.load(at + N, mask=inside, other=0.0)
    plane = slots.to(tl.int64) * count
    source = part + 2 * direction * plane
    for start in range(0, slots, SLOTS):
        there, where = slots_at(start, slots, x, inside, count, SLOTS)
        m_new = tl.load(source + where, mask=there, other=HIDDEN)
        l_new = tl.load(source + plane + where, mask=there, other=0.0)
        if direction == SIMILARITY:
            m += tl.sum(tl.where(there, m_new, 0.0), 0)
            l += tl.sum(l_new, 0)
        else:
            top = tl.max(m_new, 0)
            if INFONCE:
                l_new *= tl.exp2(m_new - top[None, :])
            m, l = merge_pair(m, l, top, tl.sum(l_new, 0), INFONCE)
    tl.store(at, m, mask=inside)
    tl.store(at + N, l, mask=inside)


@triton.jit(do_not_specialize=["slots", "count", "first", "N", "used"])
def merge_sums(
    part,  # (6, slots, count) float32
    sums,  # (6, N) float32, updated at first .. first + count
    slots, count, first, N,
    used,  # bit s: sum s has partials
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one tile's partial sums to the running ones, SLOTS at once. Grid: (count / BLOCK, 6)."""
    which = tl.program_id(1)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (x < count) & ((used >> which) % 2 == 1)
    at = sums + which.to(tl.int64) * N + first + x
    total = tl.load(at, mask=inside, other=0.0)
    source = part + which.to(tl.int64) * slots * count
    for start in range(0, slots, SLOTS):
        there, where = slots_at(start, slots, x, inside, count, SLOTS)
        total += tl.sum(tl.load(source + where, mask=there, other=0.0), 0)
    tl.store(at, total, mask=inside)
