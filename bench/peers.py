"""What is compared: the literal formula in eager PyTorch, the same under torch.compile, and
`fused_svr_loss`.

The eager peer is the loss as people write it: open_clip's contrastive loss (two cross entropies
over one matrix of logits) or SigLIP's, plus the support vectors' term. It computes `text @ audio.T`
once and transposes it, the faster of the two usual forms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import supclap_kernels as sk

Loss = Callable[..., Tensor]
"""(audio, text, radius, scale[, bias]) -> loss; `bias` with SigLIP only."""

MIB = 2**20
KINDS = ("eager", "compile", "ours")


def support_vectors(audio: Tensor, text: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """T_sup, A_sup (N, D): each row moved by the radius along the direction to its partner."""
    step = radius * F.normalize(audio - text, dim=1)
    return text + step, audio - step


def infonce_literal(bilateral: str) -> Loss:
    """InfoNCE of both directions plus the SVR term, as in the paper."""

    def loss(audio: Tensor, text: Tensor, radius: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(len(text), device=text.device)
        text_sup, audio_sup = support_vectors(audio, text, radius)
        logits = scale * text @ audio.t()
        logits_sup = scale * text_sup @ audio.t()
        total = F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)
        total = total + F.cross_entropy(logits_sup, labels)
        if bilateral == "mirror":
            total = total + F.cross_entropy(scale * audio_sup @ text.t(), labels)
        if bilateral == "shared":
            total = total + F.cross_entropy(logits_sup.t(), labels)
        return total

    return loss


def siglip_literal(bilateral: str) -> Loss:
    """The sigmoid loss over all pairs plus the SVR term (one matrix, so "shared" is "none")."""

    def loss(audio: Tensor, text: Tensor, radius: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        N = len(text)
        signs = 2.0 * torch.eye(N, dtype=text.dtype, device=text.device) - 1.0
        text_sup, audio_sup = support_vectors(audio, text, radius)

        def term(X: Tensor, Y: Tensor) -> Tensor:
            return -F.logsigmoid(signs * (scale * X @ Y.t() + bias)).sum() / N

        total = term(text, audio) + term(text_sup, audio)
        return total + term(audio_sup, text) if bilateral == "mirror" else total

    return loss


def eager(objective: str = "infonce", bilateral: str = "none") -> Loss:
    """The literal formula, op by op."""
    return siglip_literal(bilateral) if objective == "siglip" else infonce_literal(bilateral)


def compiled(objective: str = "infonce", bilateral: str = "none") -> Loss:
    """The literal formula under torch.compile, specialised to each shape, as one graph."""
    return torch.compile(eager(objective, bilateral), dynamic=False, fullgraph=True)


def ours(**options: Any) -> Loss:
    """`fused_svr_loss` with these options."""

    def loss(
        audio: Tensor, text: Tensor, radius: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return sk.fused_svr_loss(audio, text, radius, scale, bias, **options)

    return loss


@dataclass(frozen=True)
class Peer:
    """One competitor, by plain values, so that a fresh process can build it again."""

    kind: str
    objective: str = "infonce"
    bilateral: str = "none"
    dtype: str = "float32"
    workspace_mib: int | None = None
    """of ours; None: the default"""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if self.kind != "ours" and self.workspace_mib is not None:
            raise ValueError(f"only ours has a workspace, not {self.kind!r}")

    @property
    def label(self) -> str:
        """Its name in tables: unique within a group."""
        parts = [self.kind] if self.dtype == "float32" else [self.kind, self.dtype]
        return "-".join(parts + ([f"{self.workspace_mib}MiB"] if self.workspace_mib else []))

    @property
    def options(self) -> dict[str, str | int]:
        """The options of `fused_svr_loss` that this peer stands for, less the workspace."""
        return {"objective": self.objective, "bilateral": self.bilateral}

    def build(self) -> Loss:
        """The callable; compiling happens at its first call."""
        if self.kind == "eager":
            return eager(self.objective, self.bilateral)
        if self.kind == "compile":
            return compiled(self.objective, self.bilateral)
        if self.workspace_mib is None:
            return ours(**self.options)
        return ours(**self.options, workspace=self.workspace_mib * MIB)
