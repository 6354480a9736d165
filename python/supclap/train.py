"""The training loop, top to bottom: data, model, loss, optimiser, steps, checkpoints.

Large batches. A contrastive loss compares every pair with every other pair of the batch, so
summing `loss / accumulation_steps` over small batches is WRONG: it never sees the negatives
between them and trains a different objective. `--micro-batch-size` keeps the batch whole and only
encodes it piece by piece (`supclap_kernels.cached_step`).

Many processes (`torchrun --nproc-per-node=W -m supclap train ...`). Each encodes its share of every
batch; the loss compares across all of them, and gradients are averaged. Without dropout it is the
same run as with one.

Resuming. `supclap train --resume RUN` goes on from the last checkpoint (checkpoint.py); on a CPU
the losses are those of a run that was never interrupted, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from supclap_kernels import DynamicRadius, StaticRadius, SVRLoss, cached_step

from .checkpoint import FINISHED, LAST, STATE, Progress, is_finished, load_state, save_state
from .config import Interrupted, TrainConfig, UserError, config_text
from .data import Batch, Corpus, Epoch, steps_of
from .diagnose import Diagnosis
from .evaluate import Metrics, Use, evaluate_corpus
from .files import write_json, write_text
from .logs import Logs
from .manifest import read_manifest
from .model import SupclapModel, load_weights, save_model
from .ranks import Ranks, choose_device, set_threads, stop_asked

MAX_LOG_SCALE = math.log(100.0)


def build_loss(config: TrainConfig, batch_size: int, group: Any = None) -> SVRLoss:
    """The criterion; it owns the semantic radius."""
    radius: StaticRadius | DynamicRadius | None = None
    side, _, kind = config.svr.partition("-")
    if kind == "static":
        radius = StaticRadius(init=config.radius_init)
    elif kind == "dynamic":
        size = batch_size if config.radius_features == "similarities" else None
        radius = DynamicRadius(size, init=config.radius_init, features=config.radius_features)
    return SVRLoss(
        radius=radius,
        objective=config.loss,
        bilateral=config.bilateral if side == "bi" else "none",
        alpha=config.alpha,
        beta=config.beta if config.beta is not None else 0.01 * (kind == "dynamic"),
        group=group,
        return_stats=True,
    )


def build_optimizer(
    config: TrainConfig, model: SupclapModel, criterion: SVRLoss
) -> torch.optim.Optimizer:
    """Weight decay on matrices only, never on norms, biases, temperature or radius. Each group has
    its own peak learning rate, `peak`."""
    model.log_scale.requires_grad_(config.learn_tau)
    model.logit_bias.requires_grad_(config.loss == "siglip")
    frozen = ("audio", "text") if config.freeze == "both" else (config.freeze,)
    for name in ("audio", "text"):
        getattr(model, name).encoder.requires_grad_(name not in frozen)
    rates = {"audio.encoder.": config.audio_lr, "text.encoder.": config.text_lr}
    parts: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in [*model.named_parameters(), *criterion.named_parameters()]:
        if p.requires_grad:
            own = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), None)
            matrix = p.ndim > 1 and not name.startswith("radius.")
            key = (own or config.lr, config.weight_decay if matrix else 0.0)
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
    """Share of the peak learning rate: linear warm-up, then half a cosine down to zero, or 1; step
    counts from 0."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def compute_loss(
    model: SupclapModel,
    criterion: SVRLoss,
    audio: Tensor,
    text: Tensor,
    ids: Tensor | None,
    ranks: Ranks,
) -> tuple[Tensor, dict[str, float | None]]:
    """audio, text: [B, D] unit rows -> the loss and the numbers of this step's log line."""
    bias = model.logit_bias if model.logit_bias.requires_grad else None  # sigmoid only
    loss, stats = criterion(audio, text, model.logit_scale, bias, ids=ids)
    gaps = (audio.detach() - text.detach()).norm(dim=1)
    gap_sum, count = ranks.sum(torch.stack([gaps.sum(), gaps.new_tensor(len(gaps))]))
    numbers = {"loss": loss, **stats._asdict(), "gap": gap_sum / count}
    numbers["logit_scale"] = model.logit_scale
    values = torch.stack([n.detach().float() for n in numbers.values()]).tolist()
    return loss, {k: v if math.isfinite(v) else None for k, v in zip(numbers, values, strict=True)}


def backward(
    model: SupclapModel,
    criterion: SVRLoss,
    batch: Batch,
    size: int | None,
    ranks: Ranks,
) -> dict[str, float | None]:
    """Forward and backward of a batch, encoded `size` pairs at a time (None: at once)."""
    line: dict[str, float | None] = {}

    def loss(audio: Tensor, text: Tensor) -> Tensor:
        value, numbers = compute_loss(model, criterion, audio, text, batch.ids, ranks)
        line.update(numbers)
        return value

    if size is None:
        loss(model.audio(*batch.audio), model.text(*batch.text)).backward()
    else:
        cached_step((model.audio, model.text), (batch.audio, batch.text), loss, size)
    return line


def due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def mean_recall(metrics: dict[str, Metrics]) -> float:
    """What "best" means: R@1 of both directions, averaged."""
    return (metrics["t2a"]["R@1"] + metrics["a2t"]["R@1"]) / 2


def read(config: TrainConfig, manifest: Path, model: SupclapModel, say: Any) -> Corpus:
    use = Use(skip_bad_audio=config.skip_bad_audio, cache=config.cache, workers=config.workers)
    corpus = use.corpus(model, read_manifest(manifest), manifest)
    for language in sorted(set(corpus.languages)):  # one that the encoder does not know says so now
        model.text.encoder.tokenizer(["x"], [language])
    if corpus.skipped:
        say(f"{manifest}: skipped {len(corpus.skipped)} bad audio files:")
        say("\n".join(f"  {reason}" for reason in corpus.skipped))
    return corpus


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train and leave `model.safetensors`, `config.json` and `log.jsonl` in `config.out`.

    With `--val`, `val.jsonl` has the metrics after each epoch. `resume` goes on with the run there.
    Returns the run's folder.
    """
    device = choose_device(config.device)
    set_threads(config.threads)
    ranks, run = Ranks(device), config.out
    first = ranks.rank == 0  # who writes
    say = print if first else lambda *_: None
    extended = ranks.any(resume and is_finished(run, config.epochs))
    held = any((run / name).exists() for name in (STATE, FINISHED, "model.safetensors"))
    if first and not resume and held and not config.overwrite:
        raise UserError(
            f"{run} already holds a run; go on with it: --resume {run}, name another --out or add "
            "--overwrite"
        )

    if config.init is not None and not resume and not (config.init / "model.safetensors").is_file():
        raise UserError(f"--init {config.init}: it has no model.safetensors")

    torch.manual_seed(config.seed)
    model = SupclapModel(config.model, config.tau, run if resume else config.init)
    corpus = read(config, config.data, model, say)
    chosen_on = config.selection
    held_out = read(config, chosen_on, model, say) if chosen_on and first else None
    pairs = len(corpus.captions)
    size = min(config.batch_size, pairs)
    if size < config.batch_size:
        say(
            f"batch size {config.batch_size} is larger than the data: "
            f"all {pairs} pairs make one batch"
        )
    if size < ranks.count:
        raise UserError(f"a batch of {size} pairs is too small for {ranks.count} processes")
    if config.loss == "infonce" and (size == 1 or (config.ids and len(corpus.clips) == 1)):
        say("NOTE: no pair of a batch has a negative: the contrastive loss is 0 and trains nothing")
    if held_out is not None and len(held_out.clips) == 1:
        say(f"NOTE: {chosen_on} has one clip, which every model finds: the first epoch is kept")
    if hasattr(model.audio.encoder, "set_statistics") and not resume and config.init is None:
        model.audio.encoder.set_statistics(corpus.sample)
    model.audio.bf16 = model.text.bf16 = config.precision == "bf16"
    model.to(device)
    criterion = build_loss(config, size, ranks.group).to(device)
    if config.init is not None and not resume:
        if not load_weights(config.init, model, criterion):
            say(f"NOTE: {config.init} has no such radius: this one begins anew")
    optimizer = build_optimizer(config, model, criterion)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    whole = isinstance(criterion.radius, DynamicRadius) and criterion.radius.batch_size is not None
    steps = steps_of(pairs, size, ranks.count, whole)
    total = config.epochs * steps

    parts, at = {"model": model, "criterion": criterion, "optimizer": optimizer}, Progress()
    note = {"selected_on": config.select_on if chosen_on else "nothing: the last"}

    def keep_model(where: str) -> None:
        at.saved = f"the checkpoint after {where}"
        said = note | {"step": str(at.step)}
        save_model(run / "model.safetensors", model, said, criterion)

    def checkpoint() -> None:
        logs.sync()
        if first and (held_out is None or at.best < 0):
            keep_model(f"step {at.step}")
        save_state(run, parts, corpora, at, ranks, device)

    def validate() -> None:
        if held_out is None or not first:
            return
        metrics = evaluate_corpus(model, held_out, workers=config.workers)
        mark = {"selected_on": "test"} if config.select_on == "test" else {}
        logs.append("val", {"epoch": at.epoch, "step": at.step, **mark, **metrics})
        recall = mean_recall(metrics)
        if recall > at.best:
            at.best = recall
            where = "--test, the test set" if mark else "--val"
            when = f"epoch {at.epoch}" if at.batch == steps else f"step {at.step}"
            keep_model(f"{when} (mean R@1 on {where} {recall:.3f})")

    torch.manual_seed(config.seed + ranks.rank)  # the ranks' dropout differs
    corpora = {"data": corpus} | ({config.select_on: held_out} if held_out is not None else {})
    if resume:
        at = load_state(run, parts, corpora, ranks, device)
        if config.epochs < at.epoch - (0 if at.batch else 1):
            raise UserError(f"{run} is in epoch {at.epoch}: --epochs {config.epochs} is fewer")
    elif first:
        run.mkdir(parents=True, exist_ok=True)
        logs_of = ("log.jsonl", "val.jsonl", "diagnostics.jsonl")
        for name in (STATE, FINISHED, LAST, "model.safetensors", *logs_of):
            (run / name).unlink(missing_ok=True)
        write_text(run / "config.json", config_text(config.settled()))
        model.keep_encoders(run)
    if first:
        for leftover in run.glob("*.partial"):  # of a process that was killed
            leftover.unlink()
    say(f"{len(corpus.clips)} clips, {pairs} pairs, {total} steps on {device}")
    if config.select_on == "test":
        say(f"NOTE: the checkpoint is selected on the test set, {chosen_on}")

    logs = Logs(config, at.step, first)
    bar = tqdm(total=total, initial=at.step, desc="training", mininterval=0.5, disable=not first)
    with bar, contextlib.closing(logs), stop_asked() as asked:
        if not resume or extended:
            checkpoint()
        if first and resume:
            write_text(run / "config.json", config_text(config.settled()))
            for name in (FINISHED, LAST):
                (run / name).unlink(missing_ok=True)
        while at.epoch <= config.epochs:
            model.train()
            for name in ("audio", "text"):
                if config.freeze in (name, "both"):
                    getattr(model, name).encoder.eval()
            epoch = Epoch(
                corpus, model.text.encoder.tokenizer, size, config.seed, at.epoch,
                ranks.rank, ranks.count, whole,
            )  # fmt: skip
            for batch in epoch.batches(at.batch, config.workers, device.type == "cuda"):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * schedule(config, at.step, total)
                batch = batch.to(device, config.ids)
                diagnosis = None
                if due(config.diagnose_every, at.step + 1):
                    diagnosis = Diagnosis(model, criterion, batch, config.micro_batch_size, ranks)
                optimizer.zero_grad()
                line = backward(model, criterion, batch, config.micro_batch_size, ranks)
                ranks.average_gradients(parameters)
                limit = config.clip_grad or math.inf
                norm = nn.utils.clip_grad_norm_(parameters, limit).item()
                if line["loss"] is None or not math.isfinite(norm):
                    raise UserError(
                        f"loss or gradient is not finite at step {at.step + 1}; try a smaller "
                        f"--lr ({at.saved} is in {run})"
                    )
                optimizer.step()
                if config.learn_tau:
                    with torch.no_grad():
                        model.log_scale.clamp_(max=MAX_LOG_SCALE)
                at.step, at.batch = at.step + 1, at.batch + 1
                rate = config.lr * schedule(config, at.step - 1, total)
                now = {"step": at.step, "epoch": at.epoch}
                logs.append("log", {**now, **line, "norm": norm, "lr": rate})
                if diagnosis is not None:
                    logs.append("diagnostics", {**now, **diagnosis.finish()})
                bar.update()
                bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
                within = at.batch < steps  # at its end an epoch does both
                if within and due(config.validate_every, at.step):
                    validate()
                stop = ranks.any(asked.is_set())
                validated = chosen_on is not None and due(config.validate_every, at.step)
                if within and (stop or validated or due(config.checkpoint_every, at.step)):
                    checkpoint()  # after a validation, which may have written the model
                if stop:
                    break

            if at.batch == steps:
                validate()
                at.epoch, at.batch = at.epoch + 1, 0
                checkpoint()
            if ranks.any(asked.is_set()) and at.epoch <= config.epochs:
                if not first:
                    raise Interrupted("")  # the first one says it
                raise Interrupted(
                    f"interrupted after step {at.step} of {total}; {at.saved} and the log are in "
                    f"{run}\ngo on with: supclap train --resume {run}\n"
                    f"evaluate it with: supclap eval {run} --data MANIFEST.csv"
                )

    if first:
        done = {"step": at.step, "epochs": config.epochs, "model": at.saved}
        write_json(run / FINISHED, done)
        (run / STATE).replace(run / LAST)
    ranks.close()
    say(f"{at.saved} is in {run}")
    return run
