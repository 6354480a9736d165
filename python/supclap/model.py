"""Two encoders into one space of unit vectors, and their checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import builtin
from .adapt import add_adapters
from .ced import CED, SIZES
from .config import ModelConfig, read_config
from .errors import UserError
from .files import write_whole
from .pieces import encode_in_pieces


class Tower(nn.Module):
    """An encoder and its head, which give unit vectors in float32.

    An encoder whose inputs are padded along their second dimension says by `lengths_of(*inputs)`
    how long each row is: it gets a batch in pieces of similar length.
    """

    def __init__(self, encoder: Any, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.bf16 = False  # in training under autocast

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the encoder takes, or its outputs [B, W] -> [B, D]."""
        lowered = self.bf16 and self.training
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=lowered):
            embedding = self.head(self.encode(*inputs))
        return F.normalize(embedding.float(), dim=1)

    def encode(self, *inputs: Tensor) -> Tensor:
        """What the encoder makes of a batch, [B, W]; or made of it before, if it is frozen."""
        if len(inputs) == 1 and inputs[0].is_floating_point():
            return inputs[0]
        if not hasattr(self.encoder, "lengths_of"):
            return self.encoder(*inputs)
        return encode_in_pieces(self.encoder, inputs, self.encoder.lengths_of(*inputs))


@contextlib.contextmanager
def evaluating(model: nn.Module, inference: bool = True) -> Iterator[None]:
    """Turns dropout and gradients off, then leaves every part as it was. Without `inference` the
    results may be used under autograd later."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode() if inference else torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def build_own(name: str, option: str) -> Any:
    """Calls what builds an encoder of the user's own: py:MODULE:NAME (examples/own_encoder.py)."""
    module, _, function = name[3:].partition(":")
    if "" not in sys.path:  # a module beside the user, whatever started us
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{option} {name}: {error}") from error


def build_encoder(name: str, config: ModelConfig, kind: str, run: Path | None) -> Any:
    """Builds an encoder; `kind`: audio or text. One from a run's own folder has no weights yet: the
    checkpoint has them."""
    option = f"--{kind}-encoder"
    if name == "builtin":
        return builtin.AudioEncoder(config) if kind == "audio" else builtin.TextEncoder(config)
    if kind == "audio" and name.removeprefix("ced-") in SIZES:
        return CED(*SIZES[name.removeprefix("ced-")])
    if name.startswith("py:"):
        return build_own(name, option)
    if not name.startswith("hf:"):
        known = ["builtin", *(f"ced-{size}" for size in SIZES if kind == "audio")]
        known += ["hf:NAME", "hf:FOLDER", "py:MODULE:NAME"]
        raise UserError(f"{option} {name}: known are {', '.join(known)}")
    from . import hub

    build = hub.audio_encoder if kind == "audio" else hub.text_encoder
    if run is not None:
        return build(str(run / f"{kind}_encoder"), False, option)
    return build(name[3:], option=option)


class SupclapModel(nn.Module):
    """Both towers, the logit scale 1 / tau, and the bias of the sigmoid objective."""

    def __init__(self, config: ModelConfig, tau: float = 0.07, run: Path | None = None) -> None:
        super().__init__()
        self.config = config
        encoders = [
            build_encoder(name, config, kind, run)
            for kind, name in (("audio", config.audio_encoder), ("text", config.text_encoder))
        ]
        names = (config.audio_encoder, config.text_encoder)
        if config.lora and not any(name.startswith("hf:") for name in names):
            raise UserError("--lora needs an encoder of the hub, hf:NAME or hf:FOLDER")
        for name, encoder in zip(names, encoders, strict=True):
            if config.lora and name.startswith("hf:"):
                add_adapters(encoder, config.lora)
        projected = all(encoder.projects for encoder in encoders)
        bare = config.head == "none" or (config.head == "auto" and projected)
        widths = [encoder.width for encoder in encoders]
        if bare and widths[0] != widths[1]:
            raise UserError(
                f"--head none: the encoders have {widths[0]} and {widths[1]} dimensions; "
                "use --head mlp"
            )
        heads = [
            nn.Identity()
            if bare
            else nn.Sequential(
                nn.Linear(width, width), nn.GELU(), nn.Dropout(config.dropout),
                nn.Linear(width, config.embed_dim),
            )
            for width in widths
        ]  # fmt: skip
        self.audio, self.text = (Tower(*pair) for pair in zip(encoders, heads, strict=True))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(tau)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0), requires_grad=False)

    @property
    def logit_scale(self) -> Tensor:
        """0-d: the factor of every inner product."""
        return self.log_scale.exp()

    @property
    def width(self) -> int:
        """Dimensions of the shared space."""
        bare = isinstance(self.audio.head, nn.Identity)
        return int(self.audio.encoder.width) if bare else self.config.embed_dim

    @property
    def seconds(self) -> float:
        """How much of a clip is heard."""
        return float(min(self.config.max_seconds, self.audio.encoder.front_end.seconds))

    def keep_encoders(self, run: Path) -> None:
        """Writes what `load_model` needs beside the weights."""
        for kind, tower in (("audio", self.audio), ("text", self.text)):
            folder = run / f"{kind}_encoder"
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
            if hasattr(tower.encoder, "keep"):
                tower.encoder.keep(folder)


WEIGHTS = "model.safetensors"  # in a run's folder
CRITERION = "criterion."  # names of the criterion's tensors begin with it


def save_model(
    path: Path,
    model: SupclapModel,
    note: dict[str, str] | None = None,
    criterion: nn.Module | None = None,
) -> None:
    """Writes all tensors, the criterion's under CRITERION; an interrupted write leaves the previous
    file as it was."""
    state = model.state_dict()
    if criterion is not None:
        state |= {CRITERION + name: tensor for name, tensor in criterion.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.data_ptr() in seen:  # tied weights: the format wants tensors of their own
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        tensors[name] = tensor
    write_whole(path, lambda partial: save_file(tensors, partial, note))


def load_model(run: Path) -> SupclapModel:
    """Returns the model of a run, ready to embed."""
    config = read_config(run)
    model = SupclapModel(config.model, config.tau, run)
    load_weights(run, model)
    return model.eval()


def load_weights(run: Path, model: SupclapModel) -> None:
    """Loads the weights of a run's checkpoint into its model."""
    path = run / WEIGHTS
    try:
        tensors = load_file(path)
        model.load_state_dict({k: t for k, t in tensors.items() if not k.startswith(CRITERION)})
    except FileNotFoundError:
        raise UserError(f"{run} has no {path.name}: it ended before its first checkpoint") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}") from error


def load_criterion(run: Path, criterion: nn.Module) -> bool:
    """Loads the weights of a run's criterion. Returns False if the run has no such radius."""
    tensors = load_file(run / WEIGHTS)
    theirs = {k.removeprefix(CRITERION): t for k, t in tensors.items() if k.startswith(CRITERION)}
    ours = {name: tensor.numel() for name, tensor in criterion.state_dict().items()}
    if not ours:
        return True
    if ours != {name: tensor.numel() for name, tensor in theirs.items()}:
        return False
    criterion.load_state_dict(theirs)
    return True


def checksum(model: nn.Module) -> str:
    """Returns 16 hexadecimal digits that other weights do not have."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def selection_note(run: Path) -> dict[str, str]:
    """What every output of a checkpoint that was selected on a test set says; else nothing."""
    with safe_open(run / WEIGHTS, "pt") as stored:
        on_test = (stored.metadata() or {}).get("selected_on") == "test"
    return {"selected_on": "test"} if on_test else {}
