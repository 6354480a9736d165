"""What a training step is made of: criterion, optimiser, learning rate, forward and backward."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from supclap_kernels import (
    DynamicRadius,
    Negatives,
    Queue,
    StaticRadius,
    SVRLoss,
    cached_step,
)

from .adapt import choose_trained
from .batches import Batch
from .clock import Clock
from .config import TrainConfig
from .errors import UserError
from .model import SupclapModel
from .ranks import Ranks

SPREAD = (0.05, 0.5, 0.95)
"""Quantiles over the pairs of a batch that a line of the log has."""


def build_loss(config: TrainConfig, batch_size: int, group: Any = None) -> SVRLoss:
    """Builds the criterion, which owns the semantic radius."""
    radius: StaticRadius | DynamicRadius | None = None
    side, _, kind = config.svr.partition("-")
    if kind == "static":
        radius = StaticRadius(config.radius_init, config.radius_bound)
    elif kind == "dynamic":
        size = batch_size if config.radius_features == "similarities" else None
        radius = DynamicRadius(
            size, config.radius_init, features=config.radius_features,
            detach_similarity=config.detach_similarity, bound=config.radius_bound,
        )  # fmt: skip
    return SVRLoss(
        radius=radius,
        objective=config.loss,
        bilateral=config.bilateral if side == "bi" else "none",
        alpha=config.alpha,
        beta=config.beta,
        renormalize=config.support == "sphere",
        group=group,
        return_stats=True,
    )


def build_optimizer(
    config: TrainConfig, model: SupclapModel, criterion: SVRLoss
) -> torch.optim.Optimizer:
    """Builds the optimiser, and freezes what is not trained. Only matrices decay, not norms,
    biases, temperature or radius; each group has its own peak learning rate, `peak`."""
    model.log_scale.requires_grad_(config.learn_tau)
    model.logit_bias.requires_grad_(config.loss == "siglip")
    choose_trained(config, {"audio": model.audio.encoder, "text": model.text.encoder})
    rates = {
        "audio.encoder.": config.audio_lr, "text.encoder.": config.text_lr,
        "radius.": config.radius_lr,
    }  # fmt: skip
    parts: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in [*model.named_parameters(), *criterion.named_parameters()]:
        if p.requires_grad:
            rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), None)
            matrix = p.ndim > 1 and not name.startswith("radius.")
            key = (rate or config.lr, config.weight_decay if matrix else 0.0)
            parts.setdefault(key, []).append(p)
    groups = [
        {"params": params, "lr": peak, "peak": peak, "weight_decay": decay}
        for (peak, decay), params in parts.items()
    ]
    if not groups:
        raise UserError("nothing is left to train: --freeze, --head none and --svr none together")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.Adam([group | {"weight_decay": 0.0} for group in groups])


def schedule(config: TrainConfig, step: int, total: int) -> float:
    """Returns the share of the peak learning rate at a step, counted from 0: linear warm-up, then
    half a cosine down to zero, or 1."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@contextlib.contextmanager
def heard(radius: nn.Module | None) -> Iterator[list[Tensor]]:
    """Yields a list that gets what the radius module hands out."""
    radii: list[Tensor] = []
    if radius is None:
        yield radii
        return
    hook = radius.register_forward_hook(lambda module, inputs, R: radii.append(R.detach()))
    try:
        yield radii
    finally:
        hook.remove()


def pair_numbers(audio: Tensor, text: Tensor, R: Tensor | None, ranks: Ranks) -> dict[str, Tensor]:
    """Returns how radius R, gap r and contraction 1 - R / r lie over the pairs of the batch, and
    the share of the pairs whose R exceeds r, and 2 r; NaN without a radius."""
    r = (audio.detach() - text.detach()).float().norm(dim=1)
    without = R is None
    R = torch.full_like(r, math.nan) if R is None else R.float().expand_as(r)
    R, r = ranks.rows(torch.stack([R, r], dim=1)).unbind(dim=1)
    values = {"radius": R, "gap": r, "contraction": 1 - R / r}
    spread = torch.stack(list(values.values())).quantile(r.new_tensor(SPREAD), dim=1).t()
    numbers = {
        f"{name}_{100 * share:.0f}": point
        for name, row in zip(values, spread, strict=True)
        for share, point in zip(SPREAD, row, strict=True)
    }
    numbers["gap"] = r.mean()
    for name, bound in (("beyond_gap", r), ("beyond_twice_gap", 2 * r)):
        numbers[name] = R.mean() if without else (R > bound).float().mean()
    return numbers


def compute_loss(
    model: SupclapModel,
    criterion: SVRLoss,
    audio: Tensor,
    text: Tensor,
    ids: Tensor | None,
    ranks: Ranks,
    negatives: Negatives | None = None,
) -> tuple[Tensor, dict[str, float | None]]:
    """Returns the loss and the numbers of this step's log line. audio, text: [B, D] unit rows."""
    bias = model.logit_bias if model.logit_bias.requires_grad else None  # sigmoid only
    with heard(criterion.radius) as radii:
        given = {"ids": ids} | ({} if negatives is None else {"negatives": negatives})
        loss, stats = criterion(audio, text, model.logit_scale, bias, **given)
    R = radii[0] if radii else None
    numbers = {"loss": loss, **stats._asdict(), **pair_numbers(audio, text, R, ranks)}
    numbers["logit_scale"] = model.logit_scale
    values = torch.stack([n.detach().float() for n in numbers.values()]).tolist()
    return loss, {k: v if math.isfinite(v) else None for k, v in zip(numbers, values, strict=True)}


def further(
    wrong: Tensor | None, wrong_ids: Tensor | None, queue: Queue | None
) -> Negatives | None:
    """Wrong captions [W, D] with their ids [W], if pairs have some, and past pairs."""
    past = None if queue is None else queue.negatives()
    if wrong is None or past is None:
        return past if wrong is None else Negatives(text=wrong, text_ids=wrong_ids)
    assert past.text is not None
    ids = past.text_ids
    if ids is not None and wrong_ids is not None:
        ids = torch.cat((ids, wrong_ids))
    return past._replace(text=torch.cat((past.text, wrong)), text_ids=ids)


def backward(
    model: SupclapModel,
    criterion: SVRLoss,
    batch: Batch,
    size: int | None,
    ranks: Ranks,
    clock: Clock | None = None,
    queue: Queue | None = None,
) -> dict[str, float | None]:
    """Runs forward and backward of a batch, encoded `size` pairs at a time (None: at once), and
    returns the numbers of the log line. `clock`: is told what the loss takes, if it is one call;
    `queue`: has past pairs, and gets these."""
    line: dict[str, float | None] = {}

    def loss(audio: Tensor, text: Tensor) -> Tensor:
        text, wrong = text[: batch.pairs], text[batch.pairs :]
        negatives = further(wrong if batch.has_wrong else None, batch.wrong_ids, queue)
        value, numbers = compute_loss(model, criterion, audio, text, batch.ids, ranks, negatives)
        if queue is not None:
            queue.push(audio, text, batch.ids)
        line.update(numbers)
        return value

    if size is not None:
        cached_step((model.audio, model.text), (batch.audio, batch.text), loss, size)
        return line
    vectors = model.audio(*batch.audio), model.text(*batch.text)
    if clock is not None:
        clock.add("model")
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in vectors]
    loss(*leaves).backward()
    if clock is not None:
        clock.add("loss")
    trained = [n for n, x in enumerate(vectors) if x.requires_grad]
    torch.autograd.backward([vectors[n] for n in trained], [leaves[n].grad for n in trained])
    return line
