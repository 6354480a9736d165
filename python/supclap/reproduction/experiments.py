"""The experiments of `supclap reproduce`: which there are, on which corpora, how they are run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import FINISHED, STATE
from ..config import ModelConfig, TrainConfig
from ..corpus import load_corpus
from ..embeddings import embed_corpus
from ..errors import UserError
from ..evaluate import corpus_metrics
from ..files import write_json, write_text
from ..logs import read_lines
from ..model import load_criterion, load_model
from ..phrases import CODES
from ..step import build_loss
from ..synth import synthesise, synthesise_events
from ..train import train
from ..zeroshot import classify_run

LOSSES: dict[str, dict[str, Any]] = {
    "InfoNCE": {"svr": "none"},
    "uni-StaticSVR": {"svr": "uni-static"},
    "bi-StaticSVR": {"svr": "bi-static"},
    "uni-DynamicSVR": {"svr": "uni-dynamic"},
    "uni-DynamicSVR, no constraint": {"svr": "uni-dynamic", "beta": 0.0},
    "bi-DynamicSVR": {"svr": "bi-dynamic"},
    "bi-DynamicSVR, no constraint": {"svr": "bi-dynamic", "beta": 0.0},
    "SigLIP": {"loss": "siglip", "svr": "none"},
    "SigLIP bi-StaticSVR": {"loss": "siglip", "svr": "bi-static"},
    "SigLIP bi-DynamicSVR": {"loss": "siglip", "svr": "bi-dynamic"},
}
SIDES = ("here", "there")  # the corpus, and one with other acoustics
MAIN = ("InfoNCE", "bi-StaticSVR", "bi-DynamicSVR")
HARD = (0, 6, 12, 18, 24)  # hard negatives of figure 7
BINS = 50  # of figure 4, between -1 and 1


@dataclass(frozen=True)
class Preset:
    """How large, how long, how often."""

    clips: int
    epochs: int
    batch_size: int
    seeds: int  # of the ablation
    few: int  # seeds of every sweep
    languages: tuple[str, ...] = CODES
    captions: int = 2
    batch_sizes: tuple[int, ...] = (32, 128, 256)
    alphas: tuple[float, ...] = (0.1, 0.5, 2.0)
    noises: tuple[int, ...] = (10, 20, 40)  # percent of the captions
    radii: tuple[float, ...] = (0.02, 0.3, 0.6)
    validate_every: int = 50
    diagnose_every: int = 20
    device: str = "cpu"
    model: ModelConfig = ModelConfig()


PRESETS = {
    "smoke": Preset(
        clips=60, epochs=2, batch_size=16, seeds=2, few=1, languages=("eng", "zho"), captions=1,
        batch_sizes=(8,), alphas=(0.5,), noises=(40,), radii=(0.3,), validate_every=4,
        diagnose_every=2, model=ModelConfig(width=32, heads=2, embed_dim=32),
    ),
    "cpu": Preset(clips=1000, epochs=2, batch_size=64, seeds=5, few=2),
    "gpu": Preset(
        clips=10_000, epochs=10, batch_size=1024, seeds=5, few=3, captions=5,
        batch_sizes=(128, 256, 512, 2048), validate_every=250, diagnose_every=50, device="cuda",
        model=ModelConfig(width=256, heads=8, audio_layers=4, text_layers=4, embed_dim=256),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """One training: its group, what it varies, its seed."""

    group: str  # ablation | batch | alpha | noise | cross | radius
    name: str  # of the loss, from LOSSES
    seed: int
    value: float = 0.0  # what the group varies
    data: str = "here/train"  # manifest without its suffix
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        words = self.name.replace(",", "").replace(" ", "-")
        value = f"-{self.value:g}" if self.group not in ("ablation", "cross") else ""
        return f"{self.group}{value}-{words}-{self.seed}".lower()


def plan_experiments(preset: Preset) -> list[Experiment]:
    """Returns every experiment of a preset, the ablation first."""
    plan = [Experiment("ablation", name, seed) for seed in range(preset.seeds) for name in LOSSES]

    def vary(setting: str, group: str, name: str, seed: int, values: tuple[Any, ...]) -> None:
        for value in values:
            plan.append(Experiment(group, name, seed, value, changes={setting: value}))

    for seed in range(preset.few):
        for name in MAIN[::2]:
            vary("batch_size", "batch", name, seed, preset.batch_sizes)
        vary("alpha", "alpha", MAIN[2], seed, preset.alphas)
        for name in MAIN:
            for noise in preset.noises:
                plan.append(Experiment("noise", name, seed, noise, f"here/noise{noise}"))
            plan.append(Experiment("cross", name, seed, data="there/train"))
    for name in MAIN[1:]:
        vary("radius_init", "radius", name, 0, preset.radii)
    return plan


def make_corpora(out: Path, preset: Preset) -> None:
    """Makes `here`, `there` with other acoustics, `here/noise*`, and single events with labels."""
    shared: dict[str, Any] = {"languages": preset.languages, "captions": preset.captions}
    for seed, name in enumerate(SIDES):
        if not (out / name / "test.jsonl").exists():
            synthesise(out / name, preset.clips, seed, True, shifted=name == "there", **shared)
    for noise in preset.noises:
        target = out / f"here/noise{noise}.jsonl"
        if not target.exists():
            write_text(target, with_noise(target.with_stem("train"), noise / 100))
    if not (out / "events/labels.csv").exists():
        synthesise_events(out / "events", 2 if preset.clips < 100 else 20)
    for manifest in (f"{side}/{split}" for side in SIDES for split in ("train", "val", "test")):
        cache = str(out / "features")  # filled before the runs share it
        load_corpus(out / f"{manifest}.jsonl", preset.model.max_seconds, cache=cache)


def with_noise(manifest: Path, share: float, seed: int = 0) -> str:
    """Returns a JSONL manifest in which that share of the clips has the captions of others."""
    lines = read_lines(manifest)
    clips = np.random.default_rng(seed).permutation(len(lines))[: round(share * len(lines))]
    captions = [lines[n]["captions"] for n in np.roll(clips, 1)]
    for n, others in zip(clips, captions, strict=True):
        lines[n] = lines[n] | {"captions": others}
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def settings_of(experiment: Experiment, out: Path, preset: Preset) -> TrainConfig:
    """Returns the settings of an experiment: of the preset, of its loss, and its own changes."""
    size = experiment.changes.get("batch_size", preset.batch_size)

    def steps_between(every: int) -> int:  # as often over the data, however large the step
        return max(1, round(every * preset.batch_size / size))

    shared: dict[str, Any] = {
        "batch_size": preset.batch_size, "epochs": preset.epochs, "seed": experiment.seed,
        "validate_every": steps_between(preset.validate_every),
        "diagnose_every": steps_between(preset.diagnose_every),
        "device": preset.device, "cache": str(out / "features"), "model": preset.model,
        "checkpoint_every": preset.validate_every,
    }  # fmt: skip
    return TrainConfig(
        data=out / f"{experiment.data}.jsonl",
        val=(out / experiment.data).with_name("val.jsonl"),
        out=out / "runs" / experiment.folder,
        **(shared | LOSSES[experiment.name] | experiment.changes),
    )


def carry_out(experiment: Experiment, out: Path, preset: Preset) -> None:
    """Trains, measures and leaves `result.json` in the experiment's folder; goes on with an
    unfinished one."""
    torch.set_num_threads(1)
    config = settings_of(experiment, out, preset)
    folder = config.out
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a", encoding="utf-8") as stream:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            if not (folder / FINISHED).exists():
                start = time.monotonic()
                resume = (folder / STATE).exists()
                train(replace(config, overwrite=not resume), resume)
                seconds = None if resume else time.monotonic() - start  # None: of a part only
                cost = {"seconds": seconds, "bytes": peak_memory(config)}
                write_json(folder / "cost.json", cost)
            measurements = measure(experiment, config, out, preset)
    path = folder / "cost.json"  # not there if it was killed before it could say
    cost = {"seconds": None, "bytes": None}
    if path.exists():
        cost = json.loads(path.read_text(encoding="utf-8"))
    write_json(folder / "result.json", asdict(experiment) | measurements | cost)


def peak_memory(config: TrainConfig) -> int:
    """Returns the bytes of the GPU, or of this process, which has carried out one experiment."""
    if config.device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@torch.no_grad()
def measure(
    experiment: Experiment, config: TrainConfig, out: Path, preset: Preset
) -> dict[str, Any]:
    """Measures retrieval here and there, zero-shot, similarity of the pairs, radius by hard
    negatives."""
    model = load_model(config.out).to(config.device)
    numbers: dict[str, Any] = {}
    for side in SIDES:
        if side == "there" and experiment.group not in ("ablation", "cross"):
            continue
        manifest = out / side / "test.jsonl"
        corpus = load_corpus(manifest, config.model.max_seconds, cache=config.cache)
        text, audio = embed_corpus(model, corpus)
        numbers[side] = corpus_metrics(text, audio, corpus)
        if side != "here":
            continue
        positive = (text * audio[corpus.clip_of]).sum(dim=1).clamp(-1, 1)
        numbers["similarities"] = torch.histc(positive, BINS, -1.0, 1.0).tolist()
        if "dynamic" in config.svr and experiment.group == "ablation":
            numbers["radius_by_hard"] = radius_by_hard(config, text, audio, corpus.clip_of)
    if experiment.group == "ablation":
        labels = out / "events/labels.csv"
        numbers["zeroshot"] = classify_run(config.out, labels)["accuracy"]
    return numbers


def radius_by_hard(
    config: TrainConfig, text: torch.Tensor, audio: torch.Tensor, clip_of: torch.Tensor
) -> dict[str, float]:
    """Returns the mean radius predicted for a caption beside its clip, its K nearest other clips
    and, up to the batch size, clips drawn at random, for each K."""
    criterion = build_loss(config, config.batch_size)
    load_criterion(config.out, criterion)
    assert criterion.radius is not None
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
            radii.append(criterion.radius(audio[clips], texts, 1 / config.tau)[0].item())
        radius_of[str(hard)] = float(np.mean(radii))
    return radius_of


def read_results(out: Path, preset: Preset) -> list[dict[str, Any]]:
    """Reads `result.json` of every experiment that has one, in the plan's order."""
    paths = [out / "runs" / x.folder / "result.json" for x in plan_experiments(preset)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def check_settings(out: Path, name: str) -> None:
    """Raises an error unless the folder is new, or holds experiments of this preset, of its corpus
    and its losses, as they are now."""
    path, package = out / "preset.json", Path(__file__).parent.parent
    sources = [Path(__file__), package / "synth.py", package / "phrases.toml"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    settings = {"name": name, "sources": digest, **asdict(PRESETS[name])}
    settings = json.loads(json.dumps(settings))
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise UserError(f"{out} holds runs of other settings; name another --out")
    if not path.exists() and out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and not an earlier reproduction; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
