"""Every setting of a model and of a training run, and the two errors a user may see."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the user can put right; the command line prints its text and no traceback."""

    exit_code = 2


class Interrupted(UserError):  # noqa: N818 (stopping a run is no error)
    """The user stopped the run; what is on disk is complete and the text says where it is."""

    exit_code = 130


def check_seed(seed: int) -> None:
    """NumPy takes no negative seed, PyTorch none above 64 bits."""
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed must be in [0, 2**63), got {seed}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of both towers; written into a run's `config.json` and read back by `eval`."""

    width: int = 128  # channels of every transformer layer
    heads: int = 4
    audio_layers: int = 2
    text_layers: int = 2
    embed_dim: int = 128  # D of the shared space
    patch_frames: int = 8  # log-mel frames (10 ms each) in one audio token
    max_bytes: int = 256  # a longer caption is cut
    max_seconds: float = 30.0  # a longer clip is cut

    def __post_init__(self) -> None:
        for name in ("width", "heads", "embed_dim", "patch_frames", "max_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")
        if min(self.audio_layers, self.text_layers) < 0:
            raise UserError("--audio-layers and --text-layers must not be negative")
        if self.width % (2 * self.heads):
            raise UserError(
                f"--width must be a multiple of 2 * --heads, got {self.width} and {self.heads}"
            )
        if not 0 < self.max_seconds < 1e6:
            raise UserError(f"--max-seconds must be a positive number, got {self.max_seconds}")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `val=None`: the last checkpoint is kept, else the best on `val`."""

    data: Path
    out: Path
    val: Path | None = None
    epochs: int = 30
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05  # share of all steps
    clip_grad: float = 1.0  # largest gradient norm
    seed: int = 0
    loss: str = "static"  # infonce (no support vectors) | static | dynamic
    objective: str = "infonce"  # infonce | siglip
    bilateral: str = "mirror"  # none | mirror | shared
    alpha: float = 1.0
    beta: float | None = None  # None: 0.01 for dynamic, 0 for static
    radius_init: float = 0.1
    tau: float = 0.07  # logits = <t, a> / tau
    learn_tau: bool = False
    micro_batch_size: int | None = None  # encode a batch in pieces of this many pairs
    device: str = "auto"
    threads: int | None = None
    skip_bad_audio: bool = False
    overwrite: bool = False
    model: ModelConfig = ModelConfig()

    def __post_init__(self) -> None:
        whole = {
            "epochs": self.epochs,
            "batch-size": self.batch_size,
            "micro-batch-size": self.micro_batch_size,
        }
        for name, count in whole.items():
            if count is not None and count < 1:
                raise UserError(f"--{name} must be at least 1, got {count}")
        check_seed(self.seed)
        if not 0 <= self.warmup < 1:
            raise UserError(f"--warmup must be in [0, 1), got {self.warmup}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"--weight-decay must not be negative, got {self.weight_decay}")
        positive = {"lr": self.lr, "tau": self.tau, "clip-grad": self.clip_grad}
        for name, value in positive.items():
            if not 0 < value < float("inf"):
                raise UserError(f"--{name} must be a positive number, got {value}")


def write_config(path: Path, config: TrainConfig) -> None:
    """Write every setting as JSON."""
    path.write_text(json.dumps(asdict(config), indent=2, default=str) + "\n")


def read_model_config(path: Path) -> ModelConfig:
    """The model's shape from a run's `config.json`; an unknown key is an error."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())["model"]
        unknown = set(found) - {field.name for field in fields(ModelConfig)}
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a finished run: it has no {path.name}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the run's settings {path}: {error!r}") from error
    if unknown:
        raise UserError(f"{path} has settings this version does not know: {sorted(unknown)}")
    return ModelConfig(**found)
