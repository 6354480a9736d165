"""Does a dynamic radius say how hard a pair is? Asked of a trained predictor, on the test split."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from supclap_kernels import DynamicRadius

from ..config import TrainConfig
from ..evaluate import text_to_audio_ranks

HARD = (0, 6, 12, 18, 22)  # hard negatives of figure 7
NEAR = 0.1
"""A clip is a hard negative of a caption if its cosine is more than that of the caption's own, less
this."""


def radius_by_hard(
    radius: DynamicRadius, config: TrainConfig, text: Tensor, audio: Tensor, clip_of: Tensor
) -> dict[str, float]:
    """Returns the mean radius predicted for a caption beside its clip, its K nearest other clips
    and, up to the batch size, clips drawn at random, for each K. text: [M, D], audio: [N, D],
    clip_of: [M], the clip of each caption."""
    generator, radius_of = torch.Generator().manual_seed(0), {}
    size = min(config.batch_size, len(audio))
    rows = torch.randperm(len(text), generator=generator)[:100].tolist()
    for hard in [k for k in HARD if k < size]:
        radii = []
        for row in rows:
            positive = clip_of[row]
            order = (audio @ text[row]).argsort(descending=True)
            order = order[order != positive]
            rest = order[hard:][torch.randperm(len(order) - hard, generator=generator)]
            clips = torch.cat([positive[None], order[:hard], rest[: size - 1 - hard]])
            texts = text[row].expand(len(clips), -1)
            radii.append(radius(audio[clips], texts, 1 / config.tau)[0].item())
        radius_of[str(hard)] = float(np.mean(radii))
    return radius_of


def difficulty(
    radius: DynamicRadius, config: TrainConfig, text: Tensor, audio: Tensor, clip_of: Tensor
) -> dict[str, float | None]:
    """Compares R, R / r and the gap r of the test pairs, in batches as in training, with how hard
    the pairs are.

    Returns Spearman's correlation of each with the rank of the clip, the number of hard negatives
    in the corpus, and whether retrieval fails; and the mean of R where it fails and where not. None
    where there are no such pairs, or all are alike. Arguments as of `radius_by_hard`.
    """
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
    size = min(config.batch_size, len(text))
    batches = order[: len(order) // size * size].split(size)
    R = torch.cat([radius(audio[clip_of[rows]], text[rows], 1 / config.tau) for rows in batches])
    rows = torch.cat(batches)
    text, clip_of = text[rows], clip_of[rows]
    r = (text - audio[clip_of]).norm(dim=1)
    rank = text_to_audio_ranks(text, audio, clip_of)
    scores = text @ audio.T
    positive = scores.gather(1, clip_of[:, None])
    hard = (scores > positive - NEAR).sum(dim=1) - 1
    fails = rank > 1
    numbers = {
        f"{name} and {other}": spearman(x, y)
        for name, x in (("R", R), ("R/r", R / r), ("r", r))
        for other, y in (("rank", rank), ("hard negatives", hard), ("failure", fails))
    }
    for name, where in (("R where found", ~fails), ("R where not found", fails)):
        numbers[name] = R[where].mean().item()
    return {name: None if math.isnan(number) else number for name, number in numbers.items()}


def spearman(x: Tensor, y: Tensor) -> float:
    """Returns the correlation of the ranks of [N] numbers; equal ones share a rank."""
    places = [places_of(values) for values in (x, y)]
    with np.errstate(invalid="ignore"):  # of numbers that are all equal
        return float(np.corrcoef(places[0], places[1])[0, 1])


def places_of(values: Tensor) -> np.ndarray:
    """Returns the place of each of [N] numbers in ascending order, the mean place of equal ones."""
    _, number, counts = np.unique(values.cpu().numpy(), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[number]
