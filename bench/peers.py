"""Everything that is compared: the literal formula in eager PyTorch and under torch.compile,
`fused_svr_loss` by every way, and public kernels.

The eager peer is the loss as people write it: open_clip's contrastive loss (two cross entropies
over one matrix of logits) or SigLIP's, plus the support vectors' term. It computes `text @ audio.T`
once and transposes it, the faster of the two usual forms.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import supclap_kernels as sk
from supclap_kernels.backends import available

from .cases import MODES, Mode

MIB = 2**20
Loss = Callable[..., Tensor]
"""(audio, text, radius, scale, bias) -> loss; no radius in a plain mode, a bias with SigLIP only"""


# ------------------------------------------------------------------------------ the literal formula


def support_vectors(
    audio: Tensor, text: Tensor, radius: Tensor, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """T_sup, A_sup (N, D): each row moved by the radius along the direction to its partner."""
    step = radius * F.normalize(audio - text, dim=1)
    text_sup, audio_sup = text + step, audio - step
    if not renormalize:
        return text_sup, audio_sup
    return F.normalize(text_sup, dim=1), F.normalize(audio_sup, dim=1)


def labels_of(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)


def infonce(
    mode: Mode, audio: Tensor, text: Tensor, radius: Tensor | None, scale: Tensor, bias: None
) -> Tensor:
    """InfoNCE of both directions plus the SVR term, as in the paper."""
    labels = labels_of(text)
    logits = scale * text @ audio.t()
    total = F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)
    if radius is None:
        return total
    text_sup, audio_sup = support_vectors(audio, text, radius, mode.renormalize)
    logits_sup = scale * text_sup @ audio.t()
    total = total + F.cross_entropy(logits_sup, labels)
    if mode.bilateral == "mirror":
        total = total + F.cross_entropy(scale * audio_sup @ text.t(), labels)
    if mode.bilateral == "shared":
        total = total + F.cross_entropy(logits_sup.t(), labels)
    return total


def siglip(
    mode: Mode, audio: Tensor, text: Tensor, radius: Tensor | None, scale: Tensor, bias: Tensor
) -> Tensor:
    """The sigmoid loss over all pairs plus the SVR term (one matrix, so "shared" is "none")."""
    N = len(text)
    signs = 2.0 * torch.eye(N, dtype=text.dtype, device=text.device) - 1.0

    def term(X: Tensor, Y: Tensor) -> Tensor:
        return -F.logsigmoid(signs * (scale * X @ Y.t() + bias)).sum() / N

    total = term(text, audio)
    if radius is None:
        return total
    text_sup, audio_sup = support_vectors(audio, text, radius, mode.renormalize)
    total = total + term(text_sup, audio)
    return total + term(audio_sup, text) if mode.bilateral == "mirror" else total


@dataclass(frozen=True)
class Literal:
    """The formula op by op or, with a mode of torch.compile, as one graph for each shape."""

    compile_mode: str = ""

    def state(self, mode: str) -> str:
        """Whether this peer can compute a mode here: "ok", or why not."""
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        if self.compile_mode and not any(shutil.which(name) for name in compilers):
            return "torch.compile needs a C++ compiler"
        return "ok"

    def build(self, mode: str) -> Loss:
        """The callable; compiling happens at its first call."""
        form = MODES[mode]
        formula = infonce if form.objective == "infonce" else siglip

        def loss(*tensors: Tensor | None) -> Tensor:
            return formula(form, *tensors)

        if not self.compile_mode:
            return loss
        return torch.compile(loss, dynamic=False, fullgraph=True, mode=self.compile_mode)


# -------------------------------------------------------------------------------------------- ours


def way_state(way: str) -> str:
    """Whether a way can run here: "ok", or why not."""
    return "ok" if way == "auto" else available.state(way)


@dataclass(frozen=True)
class Ours:
    """`fused_svr_loss` by one way."""

    way: str
    workspace_mib: int = 256

    def options(self, mode: str) -> dict[str, Any]:
        return {**MODES[mode].options, "backend": self.way, "workspace": self.workspace_mib * MIB}

    def state(self, mode: str) -> str:
        return way_state(self.way)

    def build(self, mode: str) -> Loss:
        return functools.partial(sk.fused_svr_loss, **self.options(mode))


# ---------------------------------------------------------------------------------- public kernels


def linear_cross_entropy(audio: Tensor, text: Tensor, _: None, scale: Tensor, bias: None) -> Tensor:
    """PyTorch's own chunked product and cross entropy, once for each direction."""
    labels, entropy = labels_of(text), F.linear_cross_entropy
    return entropy(scale * text, audio, labels) + entropy(scale * audio, text, labels)


def inf_cl(audio: Tensor, text: Tensor, _: None, scale: Tensor, bias: None) -> Tensor:
    from inf_cl import cal_flash_loss

    def direction(X: Tensor, Y: Tensor) -> Tensor:
        return cal_flash_loss(X, Y, labels_of(X), scale).mean()

    return direction(text, audio) + direction(audio, text)


def memeff(audio: Tensor, text: Tensor, *_: Tensor | None) -> Tensor:
    """Its temperature is a number without a gradient; `stable` would rescale the gradient."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=0.07, normalized_inputs=True, stable=False)
    return 2.0 * loss(audio, text)


def siglip_kernel(audio: Tensor, text: Tensor, _: None, scale: Tensor, bias: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(audio, text, scale.log(), bias)


@functools.cache
def clip_loss() -> Any:
    """open_clip's ClipLoss, from its file alone: the package itself wants torchvision."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(next(iter(package.submodule_search_locations))) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss()


def open_clip(audio: Tensor, text: Tensor, _: None, scale: Tensor, bias: None) -> Tensor:
    """Half of ours: the mean over the two directions."""
    loss: Tensor = clip_loss()(audio, text, scale)
    return loss


@dataclass(frozen=True)
class Rival:
    """A public kernel of one plain loss."""

    objective: str
    loss: Loss
    installed: bool

    def state(self, mode: str) -> str:
        if MODES[mode].objective != self.objective or not MODES[mode].plain:
            return f"only {self.objective} without support vectors"
        return "ok" if self.installed else "not installed"

    def build(self, mode: str) -> Loss:
        return self.loss


def package(objective: str, loss: Loss) -> Rival:
    """The rival in the package that its function is named after."""
    return Rival(objective, loss, importlib.util.find_spec(loss.__name__) is not None)


PEERS: dict[str, Literal | Ours | Rival] = {
    "eager": Literal(),
    "compile": Literal("default"),
    "reduce-overhead": Literal("reduce-overhead"),
    "ours": Ours("auto"),
    "ours-32MiB": Ours("auto", 32),
    "auto": Ours("auto"),
    "cpu:small": Ours("cpu:small"),
    "cpu:panel": Ours("cpu:panel"),
    "triton:panel": Ours("triton:panel"),
    "triton:panel-32GiB": Ours("triton:panel", 32 * 1024),
    "triton:tile": Ours("triton:tile", 128),
    "cuda:panel": Ours("cuda:panel"),
    "cuda:panel-32GiB": Ours("cuda:panel", 32 * 1024),
    "cuda:hopper": Ours("cuda:hopper"),
    "cuda:single": Ours("cuda:single"),
    **{name: Ours(name) for name in ("cuda:single:16", "cuda:single:32", "cuda:single:64")},
    "linear_cross_entropy": Rival(
        "infonce", linear_cross_entropy, hasattr(F, "linear_cross_entropy")
    ),
    "open_clip": package("infonce", open_clip),
    "inf_cl": package("infonce", inf_cl),
    "memeff": package("infonce", memeff),
    "siglip-kernel": package("siglip", siglip_kernel),
}
