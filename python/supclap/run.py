"""One training run: what it is made of, one step of it, and what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from supclap_kernels import DynamicRadius, Queue, SVRLoss

from . import notes
from .augment import Augmentation
from .batches import Batch, Epoch, steps_of
from .checkpoint import FINISHED, LAST, STATE, Progress, is_finished, load_state, save_state
from .clock import PARTS, Clock
from .config import TrainConfig, config_text, read_config
from .corpus import Corpus, ReadOptions, join, read_as_heard
from .diagnose import Diagnosis
from .embeddings import encode_once
from .errors import Interrupted, UserError
from .evaluate import evaluate_corpus, mean_recall
from .files import write_json, write_text
from .logs import Logs
from .manifest import read_manifest
from .model import WEIGHTS, SupclapModel, load_criterion, load_weights, save_model
from .progress import Bar, say
from .ranks import Ranks, choose_device, lacks_bf16, set_threads
from .step import backward, build_loss, build_optimizer, schedule

MAX_LOG_SCALE = math.log(100.0)


class Run:
    """A model, its criterion, optimiser and corpus, how far training is, and the files it leaves.

    Every rank has one; the first writes the files and speaks to the user.
    """

    def __init__(
        self, config: TrainConfig, resume: bool, build: Callable[..., SVRLoss] = build_loss
    ) -> None:
        """`build`: makes the criterion of the settings, the batch size and the group."""
        self.config, self.folder, self.resume = config, config.out, resume
        self.device = choose_device(config.device)
        set_threads(config.threads)
        self.ranks = Ranks(self.device)
        self.first = self.ranks.rank == 0
        self.extended = self.ranks.any(resume and is_finished(self.folder, config.epochs))
        self.init = None if resume else config.init
        self.check_folders()

        torch.manual_seed(config.seed)
        self.model = SupclapModel(config.model, config.tau, self.folder if resume else self.init)
        self.augmentation = Augmentation(
            config.gain, config.mix, config.spec_augment, config.caption_dropout
        )
        cache = "off" if self.augmentation.of_waves else config.cache
        corpora = [self.read_corpus(manifest, cache) for manifest in config.manifests]
        self.corpus = join(corpora, config.data_weights)
        self.corpora = {"data": self.corpus}  # by the flags of their manifests
        if config.selection is not None and self.first:
            self.corpora[config.select_on] = self.read_corpus(config.selection, config.cache)
        self.held_out = self.corpora.get(config.select_on)
        self.batch_size = min(config.batch_size, self.corpus.taken)
        self.check_batches()

        self.prepare_model()
        self.criterion = build(config, self.batch_size, self.ranks.group).to(self.device)
        if self.init is not None:
            load_weights(self.init, self.model)
            if not load_criterion(self.init, self.criterion):
                self.say(f"NOTE: {self.init} has no such radius: this one begins anew")
        self.optimizer = build_optimizer(config, self.model, self.criterion)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

        radius = self.criterion.radius
        self.whole_batches = isinstance(radius, DynamicRadius) and radius.batch_size is not None
        pairs = self.corpus.taken
        self.epoch_steps = steps_of(pairs, self.batch_size, self.ranks.count, self.whole_batches)
        self.total_steps = config.epochs * self.epoch_steps

        self.parts = {"model": self.model, "criterion": self.criterion, "optimizer": self.optimizer}
        self.average: AveragedModel | None = None
        if config.ema:
            mean = get_ema_multi_avg_fn(config.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=mean)
            self.parts["average"] = self.average
        self.queue: Queue | None = None
        if config.queue:
            self.queue = Queue(max(1, config.queue // self.ranks.count))
            self.parts["queue"] = self.queue
        self.progress = Progress()
        self.reversed_steps, self.told = 0, False
        torch.manual_seed(config.seed + self.ranks.rank)  # the ranks' dropout differs
        self.open_folder()
        self.encode_frozen()
        counts = f"{len(self.corpus.clips)} clips, {len(self.corpus.captions)} pairs"
        counts += f", {pairs} of them in an epoch" * (pairs != len(self.corpus.captions))
        wrong = sum(len(clip.wrong) for clip in self.corpus.clips)
        counts += f", {wrong} hard negative" * bool(wrong) + "s" * (wrong > 1)
        self.say(f"{counts}, {self.total_steps} steps on {self.device}")
        if config.select_on == "test":
            self.say(f"NOTE: the checkpoint is selected on the test set, {config.selection}")
        self.logs, self.clock = Logs(config, self.progress.step, self.first), Clock(self.device)
        self.losses = list[float]()  # since the last line about speed
        self.bar = Bar(
            total=self.total_steps, initial=self.progress.step, desc="training",
            disable=not self.first,
        )  # fmt: skip

    # ------------------------------------------------------------------------- what it is made of

    @property
    def shown(self) -> SupclapModel:
        """The model that is validated and kept: the averaged one, if there is one."""
        return self.model if self.average is None else cast(SupclapModel, self.average.module)

    @property
    def enough(self) -> bool:
        """Whether so many validations found nothing better that training ends."""
        patience = self.config.patience
        return patience is not None and self.progress.since >= patience

    def say(self, text: str) -> None:
        if self.first:
            say(text)

    def check_folders(self) -> None:
        """Raises an error where a new run would write over another, or begins from none."""
        held = any((self.folder / name).exists() for name in (STATE, FINISHED, WEIGHTS))
        if self.first and not self.resume and held and not self.config.overwrite:
            raise UserError(
                f"{self.folder} already holds a run; go on with it: --resume {self.folder}, name "
                "another --out or add --overwrite"
            )
        if self.init is not None and not (self.init / WEIGHTS).is_file():
            raise UserError(f"--init {self.init}: it has no {WEIGHTS}")

    def read_corpus(self, manifest: Path, cache: str) -> Corpus:
        """Reads a manifest, its clips, and tells which of them were skipped."""
        config = self.config
        options = ReadOptions(
            config.skip_bad_audio, cache, config.workers, check=cache != config.cache
        )
        corpus = read_as_heard(self.model, read_manifest(manifest), manifest, options)
        for language in sorted(set(corpus.languages)):  # one that the encoder does not know fails
            self.model.text.encoder.tokenizer(["x"], [language])
        if corpus.skipped:
            self.say(f"{manifest}: skipped {len(corpus.skipped)} bad audio files:")
            self.say("\n".join(f"  {reason}" for reason in corpus.skipped))
        return corpus

    def check_batches(self) -> None:
        """Tells what the user may not expect of the size of the batches and of the corpora."""
        size = self.batch_size
        if size < self.ranks.count:
            raise UserError(
                f"a batch of {size} pairs is too small for {self.ranks.count} processes"
            )
        for note in notes.of_batches(self.config, size, self.corpus, self.held_out):
            self.say(note)

    def prepare_model(self) -> None:
        """Gives the model the statistics of the corpus, its precision and its device."""
        encoder = self.model.audio.encoder
        if hasattr(encoder, "set_statistics") and not self.resume and self.init is None:
            encoder.set_statistics(self.corpus.sample)
        self.model.audio.bf16 = self.model.text.bf16 = self.config.precision == "bf16"
        if self.config.precision == "bf16" and lacks_bf16(self.device):
            self.say("NOTE: this CPU has no units for bfloat16: --precision fp32 is faster")
        self.model.to(self.device)

    def open_folder(self) -> None:
        """Goes on from the last checkpoint, or removes what an earlier run left."""
        folder, epochs = self.folder, self.config.epochs
        if self.resume:
            self.progress = load_state(folder, self.parts, self.corpora, self.ranks, self.device)
            epoch = self.progress.epoch
            if self.extended:
                self.progress.since = 0
            if epochs < epoch - (0 if self.progress.batch else 1):
                raise UserError(f"{folder} is in epoch {epoch}: --epochs {epochs} is fewer")
            before, step = read_config(folder).epochs, self.progress.step
            for note in notes.of_epochs(self.config, before, step, self.epoch_steps):
                self.say(note)
        elif self.first:
            folder.mkdir(parents=True, exist_ok=True)
            logs = ("log.jsonl", "val.jsonl", "speed.jsonl", "diagnostics.jsonl")
            for name in (STATE, FINISHED, LAST, WEIGHTS, *logs):
                (folder / name).unlink(missing_ok=True)
            self.write_config()
            self.model.keep_encoders(folder)
        if self.first:
            for leftover in folder.glob("*.partial"):  # of a process that was killed
                leftover.unlink()

    def write_config(self) -> None:
        write_text(self.folder / "config.json", config_text(self.config.settled()))

    def encode_frozen(self) -> None:
        """Encodes what frozen encoders hear and read, once."""
        if not self.config.frozen:
            return
        changed = {"audio": self.augmentation.of_audio, "text": self.augmentation.of_text}
        changed["text"] |= self.corpus.has_wrong
        made = {}
        for flag, corpus in self.corpora.items():
            stay = tuple(x for x in self.config.frozen if flag != "data" or not changed[x])
            made[flag] = encode_once(self.model, corpus, stay, self.config.workers)
        self.corpora, self.corpus = made, made["data"]
        self.held_out = made.get(self.config.select_on)

    # ----------------------------------------------------------------------------------- one step

    def set_modes(self) -> None:
        """Turns dropout on, but for frozen encoders."""
        self.model.train()
        for name in self.config.frozen:
            getattr(self.model, name).encoder.eval()

    def batches(self) -> Iterator[Batch]:
        """Yields the batches of the epoch that are left."""
        epoch = Epoch(
            self.corpus, self.model.text.encoder.tokenizer, self.batch_size, self.config.seed,
            self.progress.epoch, self.ranks.rank, self.ranks.count, self.whole_batches,
            self.config.ids, self.augmentation, self.queue is not None,
        )  # fmt: skip
        pin = self.device.type == "cuda"
        return epoch.batches(self.progress.batch, self.config.workers, pin)

    def step(self, batch: Batch) -> None:
        """Trains on a batch, and logs it."""
        config, progress = self.config, self.progress
        self.clock.add("data")
        share = schedule(config, progress.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        batch = batch.to(self.device)
        diagnosis = None
        if is_due(config.diagnose_every, progress.step + 1):
            diagnosis = Diagnosis(
                self.model, self.criterion, batch, config.micro_batch_size, self.ranks
            )
            self.clock.add(None)
        self.optimizer.zero_grad()
        line = backward(
            self.model, self.criterion, batch, config.micro_batch_size, self.ranks, self.clock,
            self.queue,
        )  # fmt: skip
        self.ranks.average_gradients(self.parameters)
        limit = config.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, limit).item()
        if line["loss"] is None or not math.isfinite(norm):
            raise UserError(
                f"loss or gradient is not finite at step {progress.step + 1}; try a smaller "
                f"--lr ({progress.saved} is in {self.folder})"
            )
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        if config.learn_tau:
            with torch.no_grad():
                self.model.log_scale.clamp_(max=MAX_LOG_SCALE)
        self.clock.add("model")
        self.clock.pairs += batch.pairs * self.ranks.count
        self.losses.append(line["loss"])
        progress.step, progress.batch = progress.step + 1, progress.batch + 1
        place = {"step": progress.step, "epoch": progress.epoch}
        self.logs.append("log", {**place, **line, "norm": norm, "lr": config.lr * share})
        if diagnosis is not None:
            self.logs.append("diagnostics", {**place, **diagnosis.finish()})
        self.mind_contraction(line["contraction_50"])
        self.clock.add(None)
        self.bar.update()
        self.bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)

    def mind_contraction(self, median: float | None) -> None:
        """Tells, once, that the radius has run away from the gap."""
        reverses = (median or 0.0) < notes.lowest_contraction(self.config)
        self.reversed_steps = self.reversed_steps + 1 if reverses else 0
        if self.reversed_steps == notes.REVERSED_STEPS and not self.told:
            self.told = True
            self.say(notes.of_contraction(self.config))

    # ----------------------------------------------------------------------------- what it leaves

    def tell(self) -> None:
        """Writes how fast it was since the last time, and says so; then measures the model on the
        held-out corpus, if there is one, and keeps the best model."""
        progress, speed = self.progress, self.clock.line()
        place = {"epoch": progress.epoch, "step": progress.step}
        self.logs.append("speed", place | speed)
        shares = ", ".join(f"{100 * speed[part]:.0f} % {part}" for part in PARTS)
        loss = sum(self.losses) / max(1, len(self.losses))
        text = f"epoch {progress.epoch} of {self.config.epochs}, step {progress.step}: loss "
        text += f"{loss:.3f}, {speed['pairs_per_second']:.0f} pairs a second ({shares})"
        self.losses.clear()
        self.say(text + self.validate())
        self.clock.add(None)

    def validate(self) -> str:
        """Measures the model on the held-out corpus, if there is one; keeps the best model. Returns
        what there is to say."""
        if self.held_out is None:
            return ""
        progress, on_test = self.progress, self.config.select_on == "test"
        metrics = evaluate_corpus(self.shown, self.held_out, workers=self.config.workers)
        mark = {"selected_on": "test"} if on_test else {}
        place = {"epoch": progress.epoch, "step": progress.step}
        self.logs.append("val", {**place, **mark, **metrics})
        recall = mean_recall(metrics)
        progress.since += 1
        if recall > progress.best:
            progress.best, progress.since = recall, 0
            where = "--test, the test set" if on_test else "--val"
            when = f"step {progress.step}"
            if progress.batch == self.epoch_steps:
                when = f"epoch {progress.epoch}"
            self.keep_model(f"{when} (mean R@1 on {where} {recall:.3f})")
        ways = [f"{100 * metrics[way]['R@1']:.1f} % {way}" for way in ("t2a", "a2t")]
        best = "" if progress.since else ", the best so far"
        return f"; R@1 {' and '.join(ways)}{best}"

    def keep_model(self, when: str) -> None:
        """Writes the model as the run's checkpoint."""
        self.progress.saved = f"the checkpoint after {when}"
        chosen_by = self.config.select_on if self.config.selection else "nothing: the last"
        note = {"selected_on": chosen_by, "step": str(self.progress.step)}
        save_model(self.folder / WEIGHTS, self.shown, note, self.criterion)

    def checkpoint(self) -> None:
        """Writes all that is needed to go on; without a validation so far the model as well."""
        self.logs.sync()
        if self.first and (self.held_out is None or self.progress.best < 0):
            self.keep_model(f"step {self.progress.step}")
        save_state(self.folder, self.parts, self.corpora, self.progress, self.ranks, self.device)

    def begin(self) -> None:
        """Writes the first checkpoint; a run that goes on is no longer finished."""
        if not self.resume or self.extended:
            self.checkpoint()
        if self.first and self.resume:
            self.write_config()
            for name in (FINISHED, LAST):
                (self.folder / name).unlink(missing_ok=True)

    def interruption(self) -> Interrupted:
        """Returns the error that ends a run which the user stopped; the first rank says it."""
        step, saved = self.progress.step, self.progress.saved
        message = (
            f"interrupted after step {step} of {self.total_steps}; {saved} and the log are in "
            f"{self.folder}\n"
            f"go on with: supclap train --resume {self.folder}\n"
            f"evaluate it with: supclap eval {self.folder} --data MANIFEST.csv"
        )
        return Interrupted(message if self.first else "")

    def finish(self) -> None:
        """Marks the run as finished; its last state stays, so that it can be extended."""
        if self.first:
            summary = {"step": self.progress.step, "epochs": self.config.epochs}
            write_json(self.folder / FINISHED, summary | {"model": self.progress.saved})
            (self.folder / STATE).replace(self.folder / LAST)
        self.ranks.close()
        if self.enough:
            self.say(f"ended: {self.progress.since} validations found nothing better")
        self.say(f"{self.progress.saved} is in {self.folder}")


def is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
