"""The public loss: every argument, every check, then one operator."""

import contextlib
import os
from typing import Any

import torch
from torch import Tensor, nn

from . import collectives, direct, dispatch, distributed, ops
from .backends.call import Tensors
from .checks import (
    check_embeddings,
    check_values,
    checked_inputs,
    checked_options,
    group_size,
    is_lazy,
    written_out,
)
from .groups import GroupHandle, looked_up
from .negatives import Negatives, check_negatives
from .options import CHOICES, OPTION_NAMES, WORKSPACE, check_choices
from .radius import DynamicRadius, StaticRadius, radius_of
from .reference import svr_loss_reference
from .stats import SVRStats

ALONE = contextlib.nullcontext()
"""Of checks that no other rank waits for."""


def fused_svr_loss(
    audio: Tensor,
    text: Tensor,
    radius: float | Tensor | None = None,
    logit_scale: float | Tensor = 1 / 0.07,
    logit_bias: float | Tensor | None = None,
    *,
    objective: str = "infonce",
    bilateral: str = "mirror",
    alpha: float = 1.0,
    beta: float = 0.0,
    normalize: bool = False,
    renormalize: bool = True,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
    exchange: str = "gather",
    workspace: int = WORKSPACE,
    backend: str = "auto",
    return_stats: bool = False,
    negatives: Negatives | None = None,
) -> Any:
    """Contrastive loss with Support Vector Regularization (SupCLAP, arXiv 2509.21033), fused.

    L = L_orig + alpha L_svr + beta L_cons: the InfoNCE of both directions (their sum), or the
    SigLIP loss; the same for the support vectors t_sup_i = t_i + R_i u_i, u_i = (a_i - t_i) / r_i;
    and the constraint that keeps 0 <= R_i <= r_i. Equal to `svr_loss_reference`, without anything N
    x N beyond `workspace`.

    Args:
        audio, text: (N, D) embeddings, unit rows unless `normalize`, same float dtype and device;
            row i of one belongs to row i of the other.
        radius: None for the plain loss; a float or 0-d tensor (StaticSVR); (N,) (DynamicSVR). In
            units of |a - t|.
        logit_scale: inverse temperature k; float or 0-d tensor. logits = k <t, a> (+ b).
        logit_bias: b of SigLIP; float or 0-d tensor, default 0. Not with InfoNCE.
        objective: "infonce" or "siglip".
        bilateral: "none": support vectors of the texts only; "mirror": of the audios as well;
            "shared": both directions of the texts' support vectors (SigLIP has one direction: as
            "none").
        alpha, beta: weights of the SVR term and of the radius constraint; plain numbers, and
            torch.compile compiles anew for each of their values.
        normalize: L2-normalise the rows first, with the gradient through it.
        renormalize: put the support vectors back on the sphere.
        ids: (N,) int64; different rows with equal ids are not negatives of each other.
        weight: (N,) weight of row i's terms in every direction; no gradient.
        reduction: "mean" (sum / N), "sum", or "none" ((N,): row i's own terms).
        group: torch.distributed process group, or "world", the default one: the batch is all
            ranks' rows, one rank's after the other's, and every rank returns the loss of it
            ("none": of its own rows). On every rank the gradient of its own rows is the derivative
            of the sum over ranks of what they return, that of a 0-d tensor the same divided by the
            number of ranks: averaged over ranks, as DistributedDataParallel does, both are the
            gradient of the loss.
        exchange: "gather": the rows of others are here at once, and kept for backward; "ring": they
            come one rank after the other, in backward again, O(n D) memory.
        workspace: bytes the engine may use for similarities: kept for backward if they fit, else
            recomputed.
        backend: "auto", "reference", or a name of `available_backends()`.
        return_stats: also return `SVRStats`, detached values from the same pass.
        negatives: `Negatives`, embeddings beyond the batch that every row is compared with; with a
            group every rank's are everybody's. Costs one product of N x M x D for each matrix of
            their similarities, one for its gradient, and another one where they are trained;
            O((N + M) D) memory beyond `workspace`. In eager mode: a compiler's graph breaks here.

    Returns:
        The loss, float32 (float64 for float64 input), or (loss, SVRStats). Gradients reach audio,
        text, radius, logit_scale and logit_bias, each in its own dtype, for any upstream gradient;
        second derivatives need backend="reference".

    Raises:
        TypeError, ValueError: arguments that do not fit, before any work. RuntimeError: a backend
            that cannot run.
    """
    values = (
        objective, bilateral, alpha, beta, normalize, renormalize, reduction, workspace, backend,
        return_stats,
    )  # fmt: skip
    tensors = (audio, text, radius, logit_scale, logit_bias, ids, weight)
    plain = group is None and exchange == "gather" and negatives is None
    if plain and not torch.compiler.is_compiling():
        ordinary = direct.loss_of(tensors, values)
        if ordinary is not None:
            return ordinary
    group = looked_up(group)
    across = group is not None and group_size(group) > 1
    with collectives.together(group) if across else ALONE:
        check_choices(exchange=exchange)
        options = checked_options(*values)
        inputs = checked_inputs(*tensors, options.objective)
        negatives = plain_negatives(negatives, inputs, across)
        staged = across or negatives is not None
        runs_reference = dispatch.runs_reference(inputs, options, staged=staged)
    if runs_reference:
        named = options._asdict()
        return svr_loss_reference(
            *inputs[:5], ids=ids, weight=weight, group=group, return_stats=named.pop("stats"),
            negatives=negatives, **named,
        )  # fmt: skip
    loss, stats = (
        distributed.staged_loss(inputs, options, group if across else None, exchange, negatives)
        if staged
        else ops.svr_loss(inputs, options)
    )
    return loss if stats is None or not return_stats else (loss, SVRStats(*stats.unbind()))


def plain_negatives(negatives: Any, inputs: Tensors, across: bool) -> Negatives | None:
    """The negatives as the passes take them, or the error that says what does not fit."""
    found = check_negatives(negatives, inputs.audio, inputs.ids, across)
    if found is None:
        return None
    if os.environ.get("SUPCLAP_DEBUG") == "1":
        named = {f"negatives.{side}": found.of(side)[0] for side in ("audio", "text")}
        check_values(**named, logit_scale=None)
    audio, text, *ids = (x if x is None or not is_lazy(x) else written_out(x) for x in found)
    return Negatives(audio, text, *ids)


class SVRLoss(nn.Module):
    """`fused_svr_loss` as a module that owns its radius.

    Small batches on a GPU wait for the host: `torch.cuda.make_graphed_callables(criterion, (audio,
    text, logit_scale))` returns a callable whose forward and backward are one CUDA graph each.

    Args:
        radius: StaticRadius(), DynamicRadius(...), or None for the plain loss. See `attach_radius`
            where an optimizer gets the parameters of a model only.
        objective, ..., return_stats: every option of `fused_svr_loss` but ids, weight and
            negatives, which are the batch's.
        group: None, a process group, or "world": the default one, which may be initialised later
            than the module is built. Copies in this process share the group; a module that is
            pickled forgets any but the default one, and says so until its `group` is set again.
    """

    def __init__(
        self,
        radius: nn.Module | None = None,
        objective: str = "infonce",
        bilateral: str = "mirror",
        alpha: float = 1.0,
        beta: float = 0.0,
        normalize: bool = False,
        renormalize: bool = True,
        reduction: str = "mean",
        group: Any = None,
        exchange: str = "gather",
        workspace: int = WORKSPACE,
        backend: str = "auto",
        return_stats: bool = False,
    ) -> None:
        arguments = locals()
        super().__init__()
        if radius is not None and not isinstance(radius, nn.Module):
            raise TypeError(
                "radius must be a module that maps (audio, text, logit_scale) to a radius, "
                "such as StaticRadius(0.1); "
                f"got {type(radius).__name__}"
            )
        self.radius = radius
        self.options: dict[str, Any] = {name: arguments[name] for name in OPTION_NAMES}
        check_choices(**{name: self.options[name] for name in CHOICES})
        self.handle = GroupHandle(group)

    @property
    def group(self) -> Any:
        """The process group as it is now, or None; can be set to what `SVRLoss` takes."""
        return self.handle.get()

    @group.setter
    def group(self, group: Any) -> None:
        self.handle = GroupHandle(group)

    def extra_repr(self) -> str:
        every = {**self.options, "group": self.handle}
        return ", ".join(f"{name}={value!r}" for name, value in every.items())

    def forward(
        self,
        audio: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        ids: Tensor | None = None,
        weight: Tensor | None = None,
        negatives: Negatives | None = None,
    ) -> Any:
        """The loss (or loss and SVRStats) of audio, text (N, D)."""
        radius, group = None, self.group
        if self.radius is not None:
            check_embeddings(audio, text)
            normalize = self.options["normalize"]
            radius = radius_of(self.radius, audio, text, logit_scale, normalize, group)
        return fused_svr_loss(
            audio, text, radius, logit_scale, logit_bias, ids=ids, weight=weight, group=group,
            negatives=negatives, **self.options,
        )  # fmt: skip


__all__ = ["DynamicRadius", "SVRLoss", "StaticRadius", "fused_svr_loss"]
