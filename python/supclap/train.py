"""The training loop, top to bottom: data, model, loss, optimiser, steps, checkpoint.

Large batches. A contrastive loss compares every pair with every other pair of the batch, so
summing `loss / accumulation_steps` over small batches is WRONG: it never sees the negatives
between them and trains a different objective. `--micro-batch-size` keeps the batch whole and only
encodes it piece by piece (`supclap_kernels.cached_step`).

Many processes (`torchrun --nproc-per-node=W -m supclap train ...`). Each encodes its share of every
batch; the loss compares across all of them, and gradients are averaged. Same run as with one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from supclap_kernels import DynamicRadius, StaticRadius, SVRLoss, cached_step

from .config import Interrupted, TrainConfig, UserError, write_config
from .data import Corpus, encode_captions, load_corpus, pad_features
from .evaluate import Metrics, evaluate_corpus
from .model import SupclapModel, save_checkpoint

MAX_LOG_SCALE = math.log(100.0)


class Ranks:
    """The processes of this run: one, or those that torchrun started."""

    def __init__(self, device: torch.device) -> None:
        self.count, self.rank, self.group = int(os.environ.get("WORLD_SIZE", "1")), 0, None
        if self.count > 1:
            if not dist.is_initialized():
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.rank, self.group = dist.get_rank(), dist.group.WORLD

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def share(self, pairs: Tensor) -> Tensor:
        """This rank's part of a batch."""
        return pairs.tensor_split(self.count)[self.rank]

    def sum(self, x: Tensor) -> Tensor:
        """Over ranks, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """As DistributedDataParallel does, after backward."""
        found = [p.grad for p in parameters if p.grad is not None]
        if self.count > 1:
            flat = self.sum(torch.cat([g.flatten() for g in found])) / self.count
            for g, mean in zip(found, flat.split([g.numel() for g in found]), strict=True):
                g.copy_(mean.view_as(g))


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one, with torchrun that of this rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch finds no CUDA device; use --device cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def set_threads(count: int | None) -> None:
    """CPU threads of PyTorch; None leaves its own choice."""
    if count is not None and count < 1:
        raise UserError(f"--threads must be at least 1, got {count}")
    if count is not None:
        torch.set_num_threads(count)


def build_loss(config: TrainConfig, group: dist.ProcessGroup | None = None) -> SVRLoss:
    """The criterion; it owns the semantic radius."""
    radius: StaticRadius | DynamicRadius | None = None
    if config.loss == "static":
        radius = StaticRadius(init=config.radius_init)
    elif config.loss == "dynamic":  # summary features: the last batch may be smaller
        radius = DynamicRadius(init=config.radius_init, features="summary")
    beta = config.beta if config.beta is not None else 0.01 * (config.loss == "dynamic")
    return SVRLoss(
        radius=radius,
        objective=config.objective,
        bilateral=config.bilateral,
        alpha=config.alpha,
        beta=beta,
        group=group,
        return_stats=True,
    )


def build_optimizer(
    config: TrainConfig, model: SupclapModel, criterion: SVRLoss
) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, never on norms, biases, temperature or radius."""
    model.log_scale.requires_grad_(config.learn_tau)
    model.logit_bias.requires_grad_(config.objective == "siglip")
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    kept = [p for p in trained if p.ndim <= 1] + list(criterion.parameters())
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Linear warm-up, then half a cosine down to zero; step counts from 0."""
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # mel [B, F, N_MELS], lengths, text [B, L], ids [B]


def steps_of(pairs: int, size: int, ranks: int) -> int:
    """Of an epoch: the last batch may be small, but every rank has a pair of it."""
    return pairs // size + (pairs % size >= ranks)


def batches(
    corpus: Corpus, size: int, max_bytes: int, generator: torch.Generator, ranks: Ranks
) -> Iterator[Batch]:
    """One epoch: every (clip, caption) pair once, in random order; this rank's share of each batch.

    ids [B] is the clip of each pair: two captions of one clip are no negatives of each other.
    """
    captions, clip_of = corpus.captions, corpus.clip_of
    order = torch.randperm(len(captions), generator=generator).split(size)
    for whole in order[: steps_of(len(captions), size, ranks.count)]:
        pairs = ranks.share(whole)
        clips = clip_of[pairs]
        mel, lengths = pad_features([corpus.features[c] for c in clips.tolist()])
        text = encode_captions([captions[p] for p in pairs.tolist()], max_bytes)
        yield mel, lengths, text, clips


def compute_loss(
    model: SupclapModel, criterion: SVRLoss, audio: Tensor, text: Tensor, ids: Tensor, ranks: Ranks
) -> tuple[Tensor, dict[str, float | None]]:
    """audio, text: [B, D] unit rows -> the loss and the numbers of this step's log line."""
    bias = model.logit_bias if model.logit_bias.requires_grad else None  # sigmoid only
    loss, stats = criterion(audio, text, model.logit_scale, bias, ids=ids)
    gaps = (audio.detach() - text.detach()).norm(dim=1)
    gap_sum, count = ranks.sum(torch.stack([gaps.sum(), gaps.new_tensor(len(gaps))]))
    numbers = {
        "loss": loss,
        "l_t2a": stats.l_t2a,
        "l_a2t": stats.l_a2t,
        "l_svr": stats.l_svr,
        "l_cons": stats.l_cons,
        "radius": stats.radius,
        "gap": gap_sum / count,
        "contraction": stats.contraction,
        "positive_similarity": stats.positive_similarity,
        "negative_similarity": stats.negative_similarity,
        "recall_t2a": stats.recall_t2a,
        "recall_a2t": stats.recall_a2t,
        "logit_scale": model.logit_scale,
    }
    values = torch.stack([n.detach().float() for n in numbers.values()]).tolist()
    return loss, {k: v if math.isfinite(v) else None for k, v in zip(numbers, values, strict=True)}


def backward(
    model: SupclapModel, criterion: SVRLoss, batch: Batch, size: int | None, ranks: Ranks
) -> dict[str, float | None]:
    """Forward and backward of a batch, encoded `size` pairs at a time (None: at once)."""
    mel, lengths, text, ids = batch
    line: dict[str, float | None] = {}

    def loss(audio: Tensor, words: Tensor) -> Tensor:
        value, numbers = compute_loss(model, criterion, audio, words, ids, ranks)
        line.update(numbers)
        return value

    if size is None:
        loss(model.audio(mel, lengths), model.text(text)).backward()
    else:
        cached_step((model.audio, model.text), ((mel, lengths), text), loss, size)
    return line


def mean_recall(metrics: dict[str, Metrics]) -> float:
    """What "best on --val" means: R@1 of both directions, averaged."""
    return (metrics["t2a"]["R@1"] + metrics["a2t"]["R@1"]) / 2


def append(stream: TextIO, line: dict[str, object]) -> None:
    """Write one JSON object and hand it to the system at once."""
    stream.write(json.dumps(line) + "\n")
    stream.flush()


def train(config: TrainConfig) -> Path:
    """Train and leave `model.safetensors`, `config.json` and `log.jsonl` in `config.out`.

    With `--val`, `val.jsonl` has the metrics after each epoch. Returns the run's folder.
    """
    device = choose_device(config.device)
    set_threads(config.threads)
    ranks, run = Ranks(device), config.out
    first = ranks.rank == 0  # who writes
    say = print if first else lambda *_: None
    if first and (run / "log.jsonl").exists() and not config.overwrite:
        raise UserError(f"{run} already holds a run; name another --out or add --overwrite")

    corpus = load_corpus(config.data, config.model.max_seconds, config.skip_bad_audio)
    val = None
    if config.val is not None:
        val = load_corpus(config.val, config.model.max_seconds, config.skip_bad_audio)
    for manifest, loaded in ((config.data, corpus), (config.val, val)):
        if loaded is not None and loaded.skipped:
            say(f"{manifest}: skipped {len(loaded.skipped)} bad audio files:")
            say("\n".join(f"  {reason}" for reason in loaded.skipped))
    pairs = len(corpus.captions)
    batch_size = min(config.batch_size, pairs)
    if batch_size < config.batch_size:
        say(
            f"batch size {config.batch_size} is larger than the data: "
            f"all {pairs} pairs make one batch"
        )

    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    model = SupclapModel(config.model, config.tau).to(device)
    model.audio.set_statistics(corpus.features)
    criterion = build_loss(config, ranks.group).to(device)
    optimizer = build_optimizer(config, model, criterion)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    checkpoint = run / "model.safetensors"
    if first:
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.unlink(missing_ok=True)
        write_config(run / "config.json", config)
    total = config.epochs * steps_of(pairs, batch_size, ranks.count)
    step, best, saved = 0, -1.0, "no checkpoint"
    say(f"{len(corpus.clips)} clips, {pairs} pairs, {total} steps on {device}")

    with (
        open(run / "log.jsonl" if first else os.devnull, "w") as log,
        open(run / "val.jsonl" if first else os.devnull, "w") as val_log,
        tqdm(total=total, desc="training", mininterval=0.5, disable=not first) as bar,
    ):
        try:
            for epoch in range(1, config.epochs + 1):
                model.train()
                for batch in batches(corpus, batch_size, config.model.max_bytes, generator, ranks):
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(config, step, total)
                    mel, lengths, text, ids = batch
                    batch = (mel.to(device), lengths.to(device), text.to(device), ids.to(device))
                    optimizer.zero_grad()
                    line = backward(model, criterion, batch, config.micro_batch_size, ranks)
                    ranks.average_gradients(parameters)
                    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad).item()
                    if line["loss"] is None or not math.isfinite(norm):
                        raise UserError(
                            f"loss or gradient is not finite at step {step + 1}; try a smaller "
                            f"--lr ({saved} in {run})"
                        )
                    optimizer.step()
                    with torch.no_grad():
                        model.log_scale.clamp_(max=MAX_LOG_SCALE)
                    step += 1
                    rate = optimizer.param_groups[0]["lr"]
                    append(log, {"step": step, "epoch": epoch, **line, "norm": norm, "lr": rate})
                    bar.update()
                    bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)

                if not first:
                    continue
                if val is None:
                    save_checkpoint(checkpoint, model)
                    saved = f"the checkpoint after epoch {epoch}"
                    continue
                metrics = evaluate_corpus(model, val)
                append(val_log, {"epoch": epoch, "step": step, **metrics})
                recall = mean_recall(metrics)
                if recall > best:
                    save_checkpoint(checkpoint, model)
                    best = recall
                    saved = f"the checkpoint after epoch {epoch} (mean R@1 on --val {best:.3f})"
        except KeyboardInterrupt:
            if first and (val is None or best < 0):
                save_checkpoint(checkpoint, model)
                saved = f"the checkpoint after step {step}"
            raise Interrupted(
                f"interrupted after step {step} of {total}; {saved} and the log are in {run}\n"
                f"evaluate it with: supclap eval {run} --data MANIFEST.csv"
            ) from None

    ranks.close()
    say(f"{saved} is in {run}")
    return run
