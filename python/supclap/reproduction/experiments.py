"""The experiments of `supclap reproduce`: which there are, on which corpora, how they are run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from supclap_kernels import DynamicRadius, SVRLoss

from ..checkpoint import FINISHED, STATE
from ..config import TrainConfig
from ..corpus import load_corpus
from ..embeddings import embed_corpus
from ..errors import UserError
from ..evaluate import corpus_metrics
from ..files import write_json
from ..model import load_criterion, load_model
from ..step import build_loss
from ..train import train
from ..zeroshot import classify_run
from .controls import CONTROLS, build_control
from .corpora import EVENTS, SIDES
from .difficulty import difficulty, radius_by_hard
from .presets import PRESETS, Preset

INFONCE, STATIC, DYNAMIC = MAIN = ("InfoNCE", "bi-StaticSVR", "bi-DynamicSVR")
SVR = (STATIC, DYNAMIC)
LOSSES: dict[str, dict[str, Any]] = {
    INFONCE: {"svr": "none"},
    "uni-StaticSVR": {"svr": "uni-static"},
    STATIC: {"svr": "bi-static"},
    "uni-DynamicSVR": {"svr": "uni-dynamic"},
    "uni-DynamicSVR, no constraint": {"svr": "uni-dynamic", "radius_bound": "none", "beta": 0.0},
    DYNAMIC: {"svr": "bi-dynamic"},
    "bi-DynamicSVR, no constraint": {"svr": "bi-dynamic", "radius_bound": "none", "beta": 0.0},
    "SigLIP": {"loss": "siglip", "svr": "none"},
    "SigLIP bi-StaticSVR": {"loss": "siglip", "svr": "bi-static"},
    "SigLIP bi-DynamicSVR": {"loss": "siglip", "svr": "bi-dynamic"},
}
# Of support vectors and radius, the formulas' own first. Without a beta it is the paper's.
READINGS: dict[str, dict[str, Any]] = {
    "free": {"support": "free", "radius_bound": "none", "beta": None},
    "sphere": {"support": "sphere", "radius_bound": "none", "beta": None},
    "sphere, beta 1": {"support": "sphere", "radius_bound": "none", "beta": 1.0},
    "free, bounded": {"support": "free", "radius_bound": "gap", "beta": None},
    "sphere, bounded": {"support": "sphere", "radius_bound": "gap", "beta": None},
}
READING, INIT = "sphere, beta 1", 1.0
CHOSEN: dict[str, Any] = READINGS[READING] | {"radius_init": INIT}
"""That of every loss unless it says otherwise; the trainer's default."""
LITERAL = READINGS["free"] | {"radius_init": 0.1}
"""What the paper's formulas say, with the initial radius of this library's first versions."""
LARGEST = 0.9
"""R / r with a bound, in place of an initial radius of 1."""
FAST = ("sphere", "sphere, beta 1")
"""Readings that are tried with a larger learning rate of the radius as well."""
DETACHED: dict[str, Any] = {"detach_similarity": True, "radius_init": 0.5}
CONTENDERS = {"sphere, beta 1": 1.0, "sphere, bounded": LARGEST}
"""Readings that are tried at other learning rates and on recordings, each from one radius."""
DEFAULTS = {"alpha": 1.0, "bilateral": "mirror", "detach_similarity": False, **CHOSEN}
"""What a loss need not say: a training that says it is the same one."""
BINS = 50  # of figure 4, between -1 and 1
HERE = "here/train"


@dataclass(frozen=True)
class Experiment:
    """One training: a loss, what is changed of the preset and of the loss, a seed."""

    name: str  # of LOSSES or CONTROLS
    seed: int
    data: str = HERE  # manifest without its suffix
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What differs from the preset; equal trainings have equal settings."""
        loss = LOSSES.get(self.name, {"svr": "none", "control": self.name})
        settings = loss | self.changes
        return {key: x for key, x in settings.items() if x != DEFAULTS.get(key, (x,))}

    @property
    def folder(self) -> str:
        words = [f"{key}-{x}" for key, x in sorted(self.settings.items())]
        if self.data != HERE:
            words.append(self.data.replace("/", "-"))
        return "_".join([*words, f"seed-{self.seed}"]).replace(" ", "-")


def initial(init: float, reading: dict[str, Any]) -> dict[str, Any]:
    """Returns the setting of an initial radius, which with a bound is below 1."""
    return {"radius_init": min(init, LARGEST) if reading["radius_bound"] == "gap" else init}


def plan_experiments(preset: Preset) -> list[Experiment]:
    """Returns every experiment of a preset, by seed; those of two purposes once."""
    plan: dict[str, Experiment] = {}

    def add(name: str, seeds: int, data: str = HERE, **changes: Any) -> None:
        for seed in range(seeds):
            experiment = Experiment(name, seed, data, changes)
            plan.setdefault(experiment.folder, experiment)

    for name in MAIN:
        add(name, preset.seeds)
        add(name, preset.seeds, epochs=preset.long * preset.epochs)
    for name in SVR:
        add(name, preset.seeds, **LITERAL)
    for rate in preset.rates:
        add(INFONCE, preset.seeds, lr=rate * preset.lr)
    for words, init in CONTENDERS.items():
        changes = READINGS[words] | {"radius_init": init}
        for name in SVR:
            add(name, preset.few, **changes)
            for rate in preset.other_rates:
                add(name, preset.few, **changes, lr=rate * preset.lr)
    if preset.main_only:
        return sorted(plan.values(), key=lambda experiment: experiment.seed)
    add(INFONCE, preset.few, epochs=2 * preset.epochs)
    for name in (*LOSSES, *CONTROLS):
        add(name, preset.few)
    for reading in READINGS.values():
        for name in SVR:
            for init in preset.inits:
                add(name, preset.few, **reading, **initial(init, reading))
        add(DYNAMIC, preset.few, **reading, **DETACHED)
    for fast in FAST:
        add(STATIC, preset.few, **READINGS[fast], radius_init=0.5, radius_lr=10 * preset.lr)
    for size in preset.batch_sizes:
        for name in MAIN:
            add(name, preset.few, batch_size=size)
    for alpha in preset.alphas:
        add(DYNAMIC, preset.few, alpha=alpha)
    for name in MAIN:
        for noise in preset.noises:
            add(name, preset.few, f"here/noise{noise}")
        add(name, preset.few, "there/train")
    return sorted(plan.values(), key=lambda experiment: experiment.seed)


def settings_of(experiment: Experiment, out: Path, preset: Preset) -> TrainConfig:
    """Returns the settings of an experiment: of the preset, of its loss, and its own changes."""
    settings = DEFAULTS | {key: x for key, x in experiment.settings.items() if key != "control"}
    if settings["beta"] is None:
        settings["beta"] = 0.01 if settings["svr"].endswith("dynamic") else 0.0
    size = settings.get("batch_size", preset.batch_size)
    times = settings.get("epochs", preset.epochs) / preset.epochs

    def steps_between(every: int) -> int:  # as often in a run, however large and many its steps
        return max(1, round(every * times * preset.batch_size / size))

    shared: dict[str, Any] = {
        "batch_size": preset.batch_size, "epochs": preset.epochs, "seed": experiment.seed,
        "lr": preset.lr, "validate_every": steps_between(preset.validate_every),
        "diagnose_every": steps_between(preset.diagnose_every),
        "device": preset.device, "cache": str(out / "features"), "model": preset.model,
        "checkpoint_every": preset.validate_every, "ids": "clip",
    }  # fmt: skip
    return TrainConfig(
        data=out / f"{experiment.data}.jsonl",
        val=(out / experiment.data).with_name("val.jsonl"),
        out=out / "runs" / experiment.folder,
        **(shared | settings),
    )


def criterion_of(experiment: Experiment) -> Callable[..., SVRLoss]:
    """Returns what builds the criterion of an experiment."""
    name = experiment.settings.get("control")
    if name is None:
        return build_loss
    return lambda config, batch_size, group=None: build_control(config, name)


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
                train(replace(config, overwrite=not resume), resume, criterion_of(experiment))
                seconds = None if resume else time.monotonic() - start  # None: of a part only
                cost = {"seconds": seconds, "bytes": peak_memory(config)}
                write_json(folder / "cost.json", cost)
            measurements = measure(experiment, config, out)
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
def measure(experiment: Experiment, config: TrainConfig, out: Path) -> dict[str, Any]:
    """Measures retrieval here and there, zero-shot classification, the similarity of the pairs, and
    what a dynamic radius says of them."""
    model = load_model(config.out).to(config.device)
    numbers: dict[str, Any] = {}
    for side in SIDES:
        manifest = out / side / "test.jsonl"
        if not manifest.exists():  # recordings have one side
            continue
        corpus = load_corpus(manifest, config.model.max_seconds, cache=config.cache)
        text, audio = embed_corpus(model, corpus)
        numbers[side] = corpus_metrics(text, audio, corpus)
        if side == "there":
            continue
        positive = (text * audio[corpus.clip_of]).sum(dim=1).clamp(-1, 1)
        numbers["similarities"] = torch.histc(positive, BINS, -1.0, 1.0).tolist()
        if config.svr.endswith("dynamic"):
            radius = trained_radius(config)
            pairs = (text, audio, corpus.clip_of)
            numbers["radius_by_hard"] = radius_by_hard(radius, config, *pairs)
            numbers["difficulty"] = difficulty(radius, config, *pairs)
    if (out / EVENTS).exists():
        numbers["zeroshot"] = classify_run(config.out, out / EVENTS)["accuracy"]
    return numbers


def trained_radius(config: TrainConfig) -> DynamicRadius:
    """Returns the radius of a finished run."""
    criterion = build_loss(config, config.batch_size)
    load_criterion(config.out, criterion)
    assert isinstance(criterion.radius, DynamicRadius)
    return criterion.radius.eval()


def check_settings(out: Path, name: str, real: Path | None = None) -> None:
    """Raises an error unless the folder is new, or holds experiments of this preset, of its corpus
    and its losses, as they are now."""
    path, here = out / "preset.json", Path(__file__)
    sources = [
        here, here.with_name("controls.py"), here.parents[1] / "synth.py",
        here.parents[1] / "phrases.toml",
    ]  # fmt: skip
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    settings = {"name": name, "sources": digest, **asdict(PRESETS[name])}
    if real is not None:
        settings["real"] = str(real.absolute())
    settings = json.loads(json.dumps(settings))
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise UserError(f"{out} holds runs of other settings; name another --out")
    if not path.exists() and out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and not an earlier reproduction; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
