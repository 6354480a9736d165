"""Two encoders into one space of unit vectors, and their checkpoint."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import builtin
from .ced import CED, SIZES
from .config import ModelConfig, UserError, read_config
from .files import write_whole


class Tower(nn.Module):
    """Encoder -> head -> unit vector, in float32."""

    def __init__(self, encoder: Any, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.bf16 = False  # in training under autocast

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the encoder takes -> [B, D]."""
        lowered = self.bf16 and self.training
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=lowered):
            embedding = self.head(self.encoder(*inputs))
        return F.normalize(embedding.float(), dim=1)


@contextlib.contextmanager
def evaluating(model: nn.Module, inference: bool = True) -> Iterator[None]:
    """No dropout, no statistics of the batch, no gradient; then every part as it was. Without
    `inference` what is computed may be used under autograd later."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode() if inference else torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def build_encoder(name: str, config: ModelConfig, kind: str, run: Path | None) -> Any:
    """`kind`: audio or text. From a run's own folder without weights: its checkpoint has them."""
    option, kept = f"--{kind}-encoder", run and run / f"{kind}_encoder"
    if name == "builtin":
        return builtin.AudioEncoder(config) if kind == "audio" else builtin.TextEncoder(config)
    if kind == "audio" and name.removeprefix("ced-") in SIZES:
        return CED(*SIZES[name.removeprefix("ced-")])
    if not name.startswith("hf:"):
        sizes = [f"ced-{size}, " for size in SIZES] if kind == "audio" else []
        raise UserError(f"{option} {name}: known are builtin, {''.join(sizes)}hf:NAME, hf:FOLDER")
    from . import hub

    build = hub.audio_encoder if kind == "audio" else hub.text_encoder
    return build(name[3:], option=option) if kept is None else build(str(kept), False, option)


class SupclapModel(nn.Module):
    """Both towers, the logit scale 1 / tau, and the bias of the sigmoid objective."""

    def __init__(self, config: ModelConfig, tau: float = 0.07, run: Path | None = None) -> None:
        super().__init__()
        self.config = config
        encoders = [
            build_encoder(name, config, kind, run)
            for kind, name in (("audio", config.audio_encoder), ("text", config.text_encoder))
        ]
        bare = config.head == "none" or (
            config.head == "auto" and all(one.projects for one in encoders)
        )
        if bare and encoders[0].width != encoders[1].width:
            raise UserError(
                f"--head none: the encoders have {encoders[0].width} and {encoders[1].width} "
                "dimensions; use --head mlp"
            )
        heads = [
            nn.Identity()
            if bare
            else nn.Sequential(
                nn.Linear(one.width, one.width), nn.GELU(), nn.Dropout(config.dropout),
                nn.Linear(one.width, config.embed_dim),
            )
            for one in encoders
        ]  # fmt: skip
        self.audio, self.text = (Tower(*pair) for pair in zip(encoders, heads, strict=True))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(tau)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0), requires_grad=False)

    @property
    def logit_scale(self) -> Tensor:
        """0-d: the factor of every inner product."""
        return self.log_scale.exp()

    def keep_encoders(self, run: Path) -> None:
        """Write what `load_model` needs beside the weights."""
        for kind, tower in (("audio", self.audio), ("text", self.text)):
            if hasattr(tower.encoder, "keep"):
                tower.encoder.keep(run / f"{kind}_encoder")


CRITERION = "criterion."


def save_model(
    path: Path,
    model: SupclapModel,
    note: dict[str, str] | None = None,
    criterion: nn.Module | None = None,
) -> None:
    """Write all tensors, the criterion's under CRITERION; an interrupted write leaves the previous
    file as it was."""
    state = model.state_dict()
    if criterion is not None:
        state |= {CRITERION + name: tensor for name, tensor in criterion.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        one = tensor.detach().cpu().contiguous()
        if one.data_ptr() in seen:  # tied weights: the format wants tensors of their own
            one = one.clone()
        seen.add(one.data_ptr())
        tensors[name] = one
    write_whole(path, lambda partial: save_file(tensors, partial, note))


def load_model(run: Path) -> SupclapModel:
    """The model of a run, ready to embed."""
    config = read_config(run)
    model = SupclapModel(config.model, config.tau, run)
    load_weights(run, model)
    return model.eval()


def load_weights(run: Path, model: SupclapModel, criterion: nn.Module | None = None) -> bool:
    """Those of a run's checkpoint; the criterion's as well, if it has such a radius: whether."""
    path = run / "model.safetensors"
    try:
        state = load_file(path)
        model.load_state_dict({k: t for k, t in state.items() if not k.startswith(CRITERION)})
    except FileNotFoundError:
        raise UserError(f"{run} has no {path.name}: it ended before its first checkpoint") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}") from error
    if criterion is None:
        return True
    theirs = {k.removeprefix(CRITERION): t for k, t in state.items() if k.startswith(CRITERION)}
    ours = {name: tensor.numel() for name, tensor in criterion.state_dict().items()}
    same = not ours or ours == {name: tensor.numel() for name, tensor in theirs.items()}
    if same and ours:
        criterion.load_state_dict(theirs)
    return same


def chosen_on_test(run: Path) -> bool:
    """Whether the checkpoint was selected on a test set."""
    with safe_open(run / "model.safetensors", "pt") as stored:
        return (stored.metadata() or {}).get("selected_on") == "test"
