"""Batches of unequal lengths, encoded in pieces of similar length: what is padded is work for
nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST = 16  # rows of a piece: of fewer, a launch costs more than the padding
WORTH = 0.85  # pieces must leave at most this share of the padded positions


def pieces_of(lengths: list[int]) -> list[list[int]]:
    """Cuts rows, sorted by length, into pieces of equal size; one piece of all, in their order,
    where little is padded."""
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    count = max(1, len(rows) // SMALLEST)
    bounds = [len(rows) * n // count for n in range(count + 1)]
    pieces = [rows[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    padded = sum(len(piece) * lengths[piece[-1]] for piece in pieces)
    if padded > WORTH * len(rows) * lengths[rows[-1]]:
        return [list(range(len(lengths)))]
    return pieces


def encode_in_pieces(
    encode: Callable[..., Tensor], inputs: tuple[Tensor, ...], lengths: Tensor
) -> Tensor:
    """Returns `encode(*inputs)`, [B, W], of inputs [B, ...] that are padded along their second
    dimension to the longest of `lengths` [B]; each piece to its own longest row."""
    real = lengths.tolist()
    pieces = pieces_of(real)
    if len(pieces) == 1:
        return encode(*inputs)
    vectors = []
    for piece in pieces:
        rows, longest = torch.tensor(piece, device=lengths.device), real[piece[-1]]
        vectors.append(encode(*(x[rows, :longest] if x.ndim > 1 else x[rows] for x in inputs)))
    order = torch.tensor([row for piece in pieces for row in piece], device=lengths.device)
    return torch.cat(vectors)[order.argsort()]
