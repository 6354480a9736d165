"""Rows beyond the batch that every pair is compared with: hard negatives, a queue, candidates."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Negatives(NamedTuple):
    """Embeddings that have no partner in the batch: further columns of the similarity matrices.

        fused_svr_loss(audio, text, negatives=Negatives(text=wrong_captions))

    They get a gradient if they require one. They have no row of their own, no positive and no
    support vector. `normalize` normalises them, too. Without their ids every row is compared with
    all of them.
    """

    audio: Tensor | None = None
    """(Ma, D), of the embeddings' dtype and device: beside the audios"""
    text: Tensor | None = None
    """(Mt, D): beside the texts"""
    audio_ids: Tensor | None = None
    """(Ma,) int64, with `ids`: a row and a negative of equal ids are not compared"""
    text_ids: Tensor | None = None
    """(Mt,) int64"""

    def of(self, side: str) -> tuple[Tensor | None, Tensor | None]:
        """The rows and the ids of "audio" or "text"."""
        return getattr(self, side), getattr(self, f"{side}_ids")

    def turned(self) -> "Negatives":
        """With the sides exchanged."""
        return Negatives(self.text, self.audio, self.text_ids, self.audio_ids)


def split_hard_negatives(rows: Tensor, N: int) -> tuple[Tensor, Negatives | None]:
    """Rows (N (1 + h), D), in which each pair's positive comes before its h hard negatives, as
    GradCache has them: the positives (N, D), and the negatives of a loss whose texts these are."""
    if N < 1 or len(rows) % N:
        raise ValueError(f"{len(rows)} rows are no multiple of {N} pairs")
    groups = rows.unflatten(0, (N, -1))
    hard = groups[:, 1:].flatten(0, 1)
    return groups[:, 0], Negatives(text=hard) if len(hard) else None


class Columns(NamedTuple):
    """The negatives of one side as a loss takes them."""

    rows: Tensor
    """(M, D)"""
    keep: Tensor | None
    """(N, M) bool: pairs that count; None: all"""


def columns_of(
    negatives: Negatives | None, side: str, ids: Tensor | None, dtype: torch.dtype, normalize: bool
) -> Columns | None:
    """The negatives of a side, raised to `dtype` and normalised if asked; None without any."""
    rows, theirs = (None, None) if negatives is None else negatives.of(side)
    if rows is None:
        return None
    rows = rows.to(dtype)
    keep = None if theirs is None or ids is None else ids[:, None] != theirs[None, :]
    return Columns(F.normalize(rows, dim=1) if normalize else rows, keep)


def check_negatives(
    negatives: Any, audio: Tensor, ids: Tensor | None, across: bool
) -> Negatives | None:
    """The negatives, or the error that says what does not fit; None for none at all. `across`: with
    those of other ranks, so that this one may have no row."""
    if negatives is None:
        return None
    if not isinstance(negatives, Negatives):
        raise TypeError(
            "negatives must be supclap_kernels.Negatives(audio=..., text=...), got "
            f"{type(negatives).__name__}"
        )
    for side in ("audio", "text"):
        rows, theirs = negatives.of(side)
        if rows is None:
            if theirs is not None:
                raise ValueError(f"negatives.{side}_ids without negatives.{side}")
            continue
        check_rows(f"negatives.{side}", rows, audio)
        if theirs is None:
            continue
        if ids is None:
            raise ValueError(f"negatives.{side}_ids are compared with ids, which are missing")
        if not isinstance(theirs, Tensor) or theirs.dtype != torch.int64:
            raise TypeError(f"negatives.{side}_ids must be an int64 tensor")
        if theirs.shape != rows.shape[:1] or theirs.device != audio.device:
            raise ValueError(
                f"negatives.{side}_ids must have shape ({len(rows)},) on {audio.device}, got "
                f"{tuple(theirs.shape)} on {theirs.device}"
            )
    present = [x for x in negatives[:2] if x is not None and (across or len(x))]
    return negatives if present else None


def check_rows(name: str, rows: Any, audio: Tensor) -> None:
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor (M, D), got {type(rows).__name__}")
    if rows.ndim != 2 or rows.shape[1] != audio.shape[1]:
        raise ValueError(f"{name} must have shape (M, {audio.shape[1]}), got {tuple(rows.shape)}")
    if rows.dtype != audio.dtype or rows.device != audio.device:
        raise TypeError(
            f"{name} must be {audio.dtype} on {audio.device} as the embeddings, got {rows.dtype} "
            f"on {rows.device}"
        )
