"""Every setting of a model and of a training run.

A setting is a flag of `supclap train` and a key of its TOML file; both are made from the fields
here. Settings given on the command line come before those of the file, and those before a recipe's.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .errors import UserError


def setting(default: Any, text: str, *choices: str) -> Any:
    """Returns a field with its line of --help."""
    return field(default=default, metadata={"help": text, "choices": choices or None})


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_seed(seed: int) -> None:
    """Raises an error for a negative seed, which NumPy refuses, and one too large for PyTorch."""
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed must be in [0, 2**63), got {seed}")


ENCODERS = "or hf:NAME or hf:FOLDER, a model of transformers, or py:MODULE:NAME"


@dataclass(frozen=True)
class ModelConfig:
    """The settings of both towers; a run keeps them in its `config.json`."""

    audio_encoder: str = setting("builtin", f"builtin, ced-tiny|mini|small|base, {ENCODERS}")
    text_encoder: str = setting("builtin", f"builtin, {ENCODERS}")
    embed_dim: int = setting(128, "dimensions of the shared space")
    head: str = setting(
        "auto", "after each encoder; auto: none after CLAP's", "auto", "mlp", "none"
    )
    dropout: float = setting(0.0, "share of the head's hidden units dropped in training")
    lora: int = setting(0, "rank of adapters in hub encoders, whose own weights stay (peft)")
    width: int = setting(128, "builtin: channels of the transformers")
    heads: int = setting(4, "builtin: attention heads")
    audio_layers: int = setting(2, "builtin: transformer layers for audio")
    text_layers: int = setting(2, "builtin: transformer layers for text")
    patch_frames: int = setting(8, "builtin: 10 ms frames in one audio token")
    max_bytes: int = setting(256, "builtin: longer captions are cut")
    max_seconds: float = setting(30.0, "longer clips are cut: anywhere in training, else the end")

    def __post_init__(self) -> None:
        for name in ("width", "heads", "embed_dim", "patch_frames", "max_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag(name)} must be at least 1")
        for name in ("audio_layers", "text_layers", "lora"):
            if getattr(self, name) < 0:
                raise UserError(f"{flag(name)} must not be negative")
        if self.width % (2 * self.heads):
            raise UserError(
                f"--width must be a multiple of 2 * --heads, got {self.width} and {self.heads}"
            )
        if not 0 < self.max_seconds < 1e6:
            raise UserError(f"--max-seconds must be a positive number, got {self.max_seconds}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be in [0, 1), got {self.dropout}")


SVR = ("none", "uni-static", "bi-static", "uni-dynamic", "bi-dynamic")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: what `supclap.train` takes."""

    data: Path | tuple[Path, ...] = setting(
        MISSING,
        "manifests (CSV, TSV, JSON, JSONL, Parquet, tar; `supclap check --help` shows them), all "
        "of which are trained on",
    )
    out: Path = setting(MISSING, "folder of the run: model.safetensors, config.json, log.jsonl")
    data_weights: tuple[float, ...] = setting(
        (),
        "how often an epoch takes the pairs of each --data; 0.5: another half each time; "
        "without: once",
    )
    init: Path | None = setting(None, "run to begin from: its model, weights and temperature")
    val: Path | None = setting(None, "manifest for choosing the best epoch; without: the last")
    test: Path | None = setting(None, "manifest for --select-on test")
    select_on: str = setting(
        "val",
        "which manifest chooses; test matches the paper and marks every output",
        "val",
        "test",
    )
    epochs: int = setting(30, "one epoch is every (clip, caption) pair once, or by weight")
    batch_size: int = setting(64, "pairs in a step, over all processes")
    micro_batch_size: int | None = setting(
        None, "encode a batch in pieces of this many pairs: same gradient, less memory"
    )
    loss: str = setting("infonce", "the contrastive loss", "infonce", "siglip")
    svr: str = setting(
        "bi-static", "support vectors: of texts or both, R learned or predicted", *SVR
    )
    bilateral: str = setting("mirror", "what bi- means (MATH.md)", "mirror", "shared")
    alpha: float = setting(1.0, "weight of the support vectors' term")
    beta: float = setting(1.0, "weight of the constraint that keeps the radius within the gap")
    support: str = setting(
        "sphere", "sphere: support vectors are put back on it; free: they are not", "sphere", "free"
    )
    radius_init: float = setting(1.0, "initial semantic radius; with --radius-bound gap, R / r")
    radius_bound: str = setting(
        "none", "gap: R = r sigmoid(.), so that no R exceeds its gap r", "none", "gap"
    )
    radius_features: str = setting(
        "summary", "what predicts a dynamic radius; similarities is the paper's and drops the last "
        "batch if it is small", "summary", "similarities",
    )  # fmt: skip
    detach_similarity: bool = setting(False, "no gradient through what predicts a dynamic radius")
    tau: float = setting(0.07, "temperature (its initial value with --learn-tau)")
    learn_tau: bool = setting(False, "learn the temperature")
    ids: str = setting(
        "both", "which pairs are no negatives of each other: of one clip, with one caption, both, "
        "or none", "clip", "caption", "both", "none",
    )  # fmt: skip
    gain: float = setting(
        0.0, "dB by which clips are made louder or softer, at most; decodes them each time"
    )
    mix: float = setting(
        0.0, "share of the pairs that get another clip over theirs, and its caption behind theirs; "
        "decodes them each time"
    )  # fmt: skip
    spec_augment: int = setting(0, "masks over a clip's frames, and as many over its bins")
    caption_dropout: float = setting(0.0, "share of a caption's words that training leaves out")
    queue: int = setting(
        0, "past pairs that are further negatives of a batch, over all processes; those of a short "
        "queue are of nearly the same model"
    )  # fmt: skip
    optimizer: str = setting("adamw", "decay is on matrices only", "adamw", "adam")
    lr: float = setting(1e-3, "peak learning rate")
    audio_lr: float | None = setting(None, "of the audio encoder, if another")
    text_lr: float | None = setting(None, "of the text encoder, if another")
    radius_lr: float | None = setting(None, "of the radius, if another")
    freeze: str = setting("none", "encoders that stay as they are", "none", "audio", "text", "both")
    train_last: int | None = setting(None, "train so many last layers of each encoder, no others")
    weight_decay: float = setting(0.01, "of AdamW")
    schedule: str = setting("cosine", "after the warm-up", "cosine", "constant")
    warmup: float = setting(0.05, "share of the steps for linear warm-up")
    ema: float = setting(0.0, "decay of an average of the weights, which is kept; 0: none")
    patience: int | None = setting(None, "validations without a better one that end training")
    clip_grad: float = setting(1.0, "largest gradient norm; 0: any")
    precision: str = setting("fp32", "bf16: encoders under autocast", "fp32", "bf16")
    seed: int = setting(0, "of the weights, the order of the pairs, crops and augmentation")
    validate_every: int | None = setting(None, "steps between validations, beside every epoch's")
    checkpoint_every: int | None = setting(None, "steps between checkpoints, beside every epoch's")
    diagnose_every: int | None = setting(None, "steps between lines of diagnostics.jsonl")
    workers: int = setting(0, "processes that decode audio")
    cache: str = setting("memory", "of features: memory, off, or a folder to keep them in")
    device: str = setting("auto", "auto takes a GPU if there is one", "auto", "cpu", "cuda")
    threads: int | None = setting(None, "CPU threads of PyTorch")
    tensorboard: bool = setting(False, "also write RUN/tensorboard")
    wandb: bool = setting(False, "also write to Weights & Biases")
    skip_bad_audio: bool = setting(False, "leave broken or missing files out instead of stopping")
    overwrite: bool = setting(False, "write over an earlier run in --out")
    model: ModelConfig = ModelConfig()

    def __post_init__(self) -> None:
        for name, setting in TRAIN.items():
            object.__setattr__(self, name, typed(setting, getattr(self, name)))
        manifests, weights = len(self.manifests), len(self.data_weights)
        if not manifests:
            raise UserError("--data names no manifest")
        if weights not in (0, manifests):
            raise UserError(f"--data-weights: {manifests} manifests and {weights} weights")
        if not all(0 < weight < math.inf for weight in self.data_weights):
            raise UserError(f"--data-weights must be positive, got {self.data_weights}")
        every = ("validate_every", "checkpoint_every", "diagnose_every")
        counts = ("epochs", "batch_size", "micro_batch_size", "threads", "train_last", "patience")
        self.check((*counts, *every), lambda count: count >= 1, "be at least 1")
        check_seed(self.seed)
        shares = ("warmup", "ema", "caption_dropout")
        self.check(shares, lambda share: 0 <= share < 1, "be in [0, 1)")
        self.check(("mix",), lambda share: 0 <= share <= 1, "be in [0, 1]")
        sizes = ("weight_decay", "clip_grad", "workers", "gain", "spec_augment", "queue")
        self.check(sizes, lambda size: 0 <= size < math.inf, "not be negative")
        rates = ("lr", "tau", "audio_lr", "text_lr", "radius_lr")
        self.check(rates, lambda rate: 0 < rate < math.inf, "be a positive number")
        for name, choices in CHOICES.items():
            value = getattr(self if name in TRAIN else self.model, name)
            if value not in choices:
                raise UserError(f"{flag(name)} must be one of {choices}, got {value!r}")
        if self.train_last is not None and self.model.lora:
            raise UserError("--train-last and --lora are two ways: drop one")
        if self.patience is not None and self.selection is None:
            raise UserError("--patience needs --val: nothing says when a run is better")
        if (self.select_on == "test") != (self.test is not None):
            raise UserError(
                "--select-on test needs --test MANIFEST, and --test is for nothing else"
            )
        self.check(("alpha", "beta", "radius_init"), math.isfinite, "be a finite number")
        if self.radius_bound == "gap":
            self.check(("radius_init",), lambda share: 0 < share < 1, "be R / r, between 0 and 1")

    def check(self, names: tuple[str, ...], allows: Callable[[Any], bool], rule: str) -> None:
        """Raises an error if one of these settings has a value that the rule does not allow."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not allows(value):
                raise UserError(f"{flag(name)} must {rule}, got {value}")

    def settled(self) -> TrainConfig:
        """Returns the settings as a run keeps them: wherever it is resumed, its files are found."""
        names = ("out", "val", "test", "init")
        paths = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        cache = self.cache if self.cache in ("memory", "off") else str(Path(self.cache).absolute())
        settled: dict[str, Any] = {name: path.absolute() for name, path in paths.items()}
        settled["data"] = tuple(path.absolute() for path in self.manifests)
        return replace(self, overwrite=False, cache=cache, **settled)

    @property
    def manifests(self) -> tuple[Path, ...]:
        """What is trained on."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The encoders that stay as they are."""
        return {"none": (), "both": ("audio", "text")}.get(self.freeze, (self.freeze,))

    @property
    def selection(self) -> Path | None:
        """The manifest that chooses the checkpoint."""
        return self.test if self.select_on == "test" else self.val


# What runs had whose config.json is older than the setting.
EARLIER = {"support": "free", "radius_bound": "none", "beta": None}
# What a run that goes on may change: where things are, how fast it is, and how long.
MOVABLE = ("data", "val", "test", "cache", "workers", "device", "threads", "epochs")
RECIPES: dict[str, dict[str, Any]] = {
    # Batch, epochs, optimiser, temperature and weights are the paper's (section 4.1); that it has
    # no warm-up, decay or clipping is read from its silence.
    "paper": {
        "audio_encoder": "hf:mispeech/ced-base",
        "text_encoder": "hf:cointegrated/SONAR_200_text_encoder",
        "embed_dim": 1024,
        "optimizer": "adam",
        "lr": 5e-5,
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "clip_grad": 0.0,
        "batch_size": 24,
        "epochs": 10,
        "svr": "bi-dynamic",
        "radius_features": "similarities",
        "tau": 0.07,
        "alpha": 1.0,
        "beta": 0.01,
    }
}
MODEL = {setting.name: setting for setting in fields(ModelConfig)}
TRAIN = {setting.name: setting for setting in fields(TrainConfig) if setting.name != "model"}
CHOICES = {
    name: setting.metadata["choices"]
    for name, setting in (TRAIN | MODEL).items()
    if setting.metadata["choices"]
}
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "Path": Path}


def explain(settings: type) -> None:
    """Adds every setting, as --help has it, to the docstring of its class."""
    lines = []
    for setting in fields(settings):
        choices = setting.metadata.get("choices")
        text = setting.metadata.get("help", "the settings of both towers")
        lines.append(
            f"    {setting.name}: {text}" + (f" ({', '.join(choices)})" if choices else "")
        )
    settings.__doc__ = "\n".join([str(settings.__doc__), "", *lines])


explain(ModelConfig)
explain(TrainConfig)


def kind_of(setting: Field[Any]) -> Any:
    """Returns the type of a setting that has a value, or of each of its values."""
    name = str(setting.type).partition(" | ")[0]
    return TYPES[name.removeprefix("tuple[").removesuffix(", ...]")]


def holds_many(setting: Field[Any]) -> bool:
    return "tuple[" in str(setting.type)


def typed(setting: Field[Any], value: Any) -> Any:
    """Takes strings for paths, and a list for a tuple, or for its only value."""
    kind = kind_of(setting)
    if holds_many(setting) and (isinstance(value, list | tuple) or kind is float):
        values = tuple(map(kind, value if isinstance(value, list | tuple) else [value]))
        return values[0] if len(values) == 1 and " | " in str(setting.type) else values
    return Path(value) if kind is Path and isinstance(value, str) else value


def fits(kind: Any, value: Any) -> bool:
    """Whether a value of a TOML file may stand for one of this type."""
    return type(value) in {float: (float, int), Path: (str,)}.get(kind, (kind,))


def read_toml(path: Path) -> dict[str, Any]:
    """Reads the settings of a file, named as the flags are, with - or _."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: {error}") from error
    settings = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        known = TRAIN | MODEL
        if name not in known:
            raise UserError(f"--config {path}: unknown key {key!r}; `supclap train --help` has all")
        kind, many = kind_of(known[name]), holds_many(known[name])
        values = value if many and isinstance(value, list) else [value]
        if not all(fits(kind, each) for each in values):
            raise UserError(f"--config {path}: {key} must be {kind.__name__}, got {value!r}")
        settings[name] = values if many else kind(value)
    return settings


def build_config(
    flags: dict[str, Any], config: Path | None = None, recipe: str | None = None
) -> TrainConfig:
    """Takes each setting from the flags, a TOML file or a recipe, the first that has it."""
    explicit = (read_toml(config) if config else {}) | flags
    settings = (RECIPES[recipe] if recipe else {}) | explicit
    for name in ("data", "out"):
        if name not in settings:
            raise UserError(f"{flag(name)} is needed: {TRAIN[name].metadata['help']}")
    if "init" in settings:
        before = read_config(settings["init"])
        theirs = asdict(before.model) | {"tau": before.tau}
        others = [name for name in theirs if explicit.get(name, theirs[name]) != theirs[name]]
        if others:
            raise UserError(
                f"--init takes the model and the temperature of {settings['init']} as they are; "
                f"drop {', '.join(map(flag, others))}"
            )
        settings = settings | theirs
    model = ModelConfig(**{name: settings[name] for name in MODEL if name in settings})
    return TrainConfig(model=model, **{name: settings[name] for name in TRAIN if name in settings})


def config_text(config: TrainConfig) -> str:
    """Returns every setting as JSON."""
    return json.dumps(asdict(config), indent=2, default=str) + "\n"


def read_config(run: Path) -> TrainConfig:
    """Reads the settings of a run, wherever it is now; an unknown one is an error."""
    path = run / "config.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model = settings.pop("model")
        unknown = (set(settings) - set(TRAIN)) | (set(model) - set(MODEL))
    except FileNotFoundError:
        raise UserError(f"{run} is not a run: it has no {path.name}") from None
    except KeyError:
        inside = f"; it was exported: use {run / 'run'}" if (run / "run").is_dir() else ""
        raise UserError(f"{path} has no settings of a run{inside}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the run's settings {path}: {error!r}") from error
    if unknown:
        raise UserError(f"{path} has settings this version does not know: {sorted(unknown)}")
    settings = EARLIER | settings | {"out": run}
    if isinstance(settings.get("ids"), bool):
        settings["ids"] = "clip" if settings["ids"] else "none"
    if settings["beta"] is None:
        settings["beta"] = 0.01 if settings["svr"].endswith("dynamic") else 0.0
    return TrainConfig(**settings, model=ModelConfig(**model))
