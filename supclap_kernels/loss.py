"""The public loss: every argument, every check, then one operator."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import collectives, dispatch, distributed, ops
from .backends.call import Inputs
from .groups import GroupHandle, looked_up
from .options import CHOICES, Options, as_python_number, check_choices
from .radius import DynamicRadius, StaticRadius, radius_of
from .reference import accumulator_dtype, svr_loss_reference
from .stats import SVRStats
from .watch import watch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WORKSPACE = 256 * 2**20


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
    renormalize: bool = False,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
    exchange: str = "gather",
    workspace: int = WORKSPACE,
    backend: str = "auto",
    return_stats: bool = False,
) -> Any:
    """Contrastive loss with Support Vector Regularization (SupCLAP, arXiv 2509.21033), fused.

    L = L_orig + alpha L_svr + beta L_cons: the InfoNCE of both directions (their sum), or the
    SigLIP loss; the same for the support vectors t_sup_i = t_i + R_i u_i, u_i = (a_i - t_i) / r_i;
    and the constraint that keeps 0 <= R_i <= r_i. Equal to `svr_loss_reference`, without anything N
    x N beyond `workspace`.

    Args:
        audio, text: (N, D) embeddings, same float dtype and device; row i of one belongs to row i
            of the other.
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

    Returns:
        The loss, float32 (float64 for float64 input), or (loss, SVRStats). Gradients reach audio,
        text, radius, logit_scale and logit_bias, each in its own dtype, for any upstream gradient;
        second derivatives need backend="reference".

    Raises:
        TypeError, ValueError: arguments that do not fit, before any work. RuntimeError: a backend
            that cannot run.
    """
    options = Options(
        objective, bilateral, alpha, beta, normalize, renormalize, reduction, workspace, backend,
        bool(return_stats),
    )  # fmt: skip
    group = looked_up(group)
    across = group is not None and ranks(group) > 1
    with collectives.together(group) if across else contextlib.nullcontext():
        check_choices(exchange=exchange)
        options = checked_options(options)
        inputs = checked_inputs(
            audio, text, radius, logit_scale, logit_bias, ids, weight, options.objective
        )
        name = dispatch.choose(backend, audio.device, audio.dtype)[0]
    if name == "reference":
        given = options._asdict()
        return svr_loss_reference(
            *inputs[:5], ids=ids, weight=weight, group=group, return_stats=given.pop("stats"),
            **given,
        )  # fmt: skip
    call = (inputs, options)
    outputs = distributed.group_loss(*call, group, exchange) if across else ops.svr_loss(*call)
    loss, stats = outputs
    return loss if stats is None or not return_stats else (loss, SVRStats(*stats.unbind()))


def checked_options(options: Options) -> Options:
    """Plain values of their types, or the error that says what does not fit."""
    check_choices(
        objective=options.objective, bilateral=options.bilateral, reduction=options.reduction,
        backend=options.backend,
    )  # fmt: skip
    alpha, beta = as_python_number(options.alpha), as_python_number(options.beta)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not isinstance(value, int | float):
            raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    workspace = as_python_number(options.workspace)
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise TypeError(f"workspace must be an int, in bytes; got {type(workspace).__name__}")
    if workspace < 0:
        raise ValueError(f"workspace must not be negative, got {workspace} bytes")
    return options._replace(
        alpha=float(alpha), beta=float(beta), workspace=workspace,
        normalize=bool(options.normalize), renormalize=bool(options.renormalize),
    )  # fmt: skip


def checked_inputs(
    audio: Tensor,
    text: Tensor,
    radius: float | Tensor | None,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    ids: Tensor | None,
    weight: Tensor | None,
    objective: str,
) -> Inputs:
    """The tensors as the operators take them, or the error that says what does not fit."""
    check_embeddings(audio, text)
    N = audio.shape[0]
    if logit_bias is not None and objective == "infonce":
        raise ValueError(
            "logit_bias belongs to objective='siglip': InfoNCE does not depend on it; pass None"
        )
    check_vector("ids", ids, N, audio.device, (torch.int64,))
    check_vector("weight", weight, N, audio.device, FLOATS)
    scale = as_scalar("logit_scale", logit_scale, audio)
    bias = None if logit_bias is None else as_scalar("logit_bias", logit_bias, audio)
    R = None if radius is None else as_radius(radius, N, audio)
    if os.environ.get("SUPCLAP_DEBUG") == "1":
        check_values(
            audio=audio, text=text, radius=R, logit_scale=scale, logit_bias=bias, weight=weight
        )
    return Inputs(audio, text, R, scale, bias, ids, weight)


def ranks(group: Any) -> int:
    """How many a process group has."""
    if not hasattr(group, "size"):
        raise TypeError(
            "group must be a torch.distributed process group that this rank is in, got "
            f"{type(group).__name__}"
        )
    return int(group.size())


def check_embeddings(audio: Tensor, text: Tensor) -> None:
    for name, value in (("audio", audio), ("text", text)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if hasattr(value, "device_mesh"):
            raise TypeError(
                f"{name} is a DTensor; pass this rank's rows, {name}.to_local(), and group= for "
                "negatives from the other ranks"
            )
        if value.ndim != 2:
            raise ValueError(f"{name} must have shape (N, D), got {tuple(value.shape)}")
    if audio.shape != text.shape:
        raise ValueError(
            "audio and text must have the same shape (N, D), row i of one belonging to row i of "
            "the other; "
            f"got audio {tuple(audio.shape)} and text {tuple(text.shape)}"
        )
    if audio.dtype != text.dtype:
        raise TypeError(
            f"audio and text must have the same dtype, got {audio.dtype} and {text.dtype}; "
            "cast one of them"
        )
    if audio.dtype not in FLOATS:
        raise TypeError(
            f"audio and text must be float32, float16, bfloat16 or float64, got {audio.dtype}"
        )
    if audio.device != text.device:
        raise ValueError(
            f"audio and text must be on the same device, got {audio.device} and {text.device}"
        )
    if audio.shape[0] == 0 or audio.shape[1] == 0:
        raise ValueError(
            f"audio and text are empty, got shape {tuple(audio.shape)}; at least one pair is needed"
        )


def check_vector(
    name: str, value: Tensor | None, N: int, device: torch.device, dtypes: Sequence[torch.dtype]
) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape ({N},), got {type(value).__name__}")
    if value.shape != (N,):
        raise ValueError(
            f"{name} must have shape ({N},), one for each pair; got {tuple(value.shape)}"
        )
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the embeddings, got {value.device}")


def as_scalar(name: str, value: float | Tensor, audio: Tensor) -> Tensor:
    """A 0-d tensor on the embeddings' device; Python numbers in the accumulator's dtype."""
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(
                f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}; "
                "use .squeeze()"
            )
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be a float tensor, got {value.dtype}")
        if value.device != audio.device:
            raise ValueError(
                f"{name} must be on {audio.device} like the embeddings, got {value.device}"
            )
        return value
    value = as_python_number(value)
    if isinstance(value, bool) or not isinstance(
        value, int | float | torch.SymFloat | torch.SymInt
    ):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(value).__name__}")
    return torch.full((), value, dtype=accumulator_dtype(audio.dtype), device=audio.device)


def as_radius(radius: float | Tensor, N: int, audio: Tensor) -> Tensor:
    """0-d or (N,)."""
    if isinstance(radius, nn.Module):
        raise TypeError(
            f"radius is a module ({type(radius).__name__}): pass it to SVRLoss(radius=...), or "
            "here what it returns, radius=module(audio, text, logit_scale)"
        )
    if type(radius) is nn.Parameter:  # a module's is watched by the module
        watch(radius)
    if isinstance(radius, Tensor) and radius.ndim > 0:
        if radius.shape != (N,):
            raise ValueError(
                f"radius must be a number, a 0-d tensor or have shape ({N},), one for each pair; "
                f"got {tuple(radius.shape)}"
            )
        check_vector("radius", radius, N, audio.device, FLOATS)
        return radius
    return as_scalar("radius", radius, audio)


def check_values(**tensors: Tensor | None) -> None:
    """SUPCLAP_DEBUG=1: what the checks above cannot see without reading device memory."""
    for name, value in tensors.items():
        if value is not None and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(f"SUPCLAP_DEBUG: {name} has {bad} values that are NaN or infinite")
    scale = tensors["logit_scale"]
    if scale is not None and bool(scale < 0):
        raise ValueError(
            f"SUPCLAP_DEBUG: logit_scale is negative ({float(scale)}): similar pairs would repel"
        )


class SVRLoss(nn.Module):
    """`fused_svr_loss` as a module that owns its radius.

    Args:
        radius: StaticRadius(), DynamicRadius(...), or None for the plain loss. See `attach_radius`
            where an optimizer gets the parameters of a model only.
        objective, ..., return_stats: every option of `fused_svr_loss` but ids and weight, which are
            the batch's.
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
        renormalize: bool = False,
        reduction: str = "mean",
        group: Any = None,
        exchange: str = "gather",
        workspace: int = WORKSPACE,
        backend: str = "auto",
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        if radius is not None and not isinstance(radius, nn.Module):
            raise TypeError(
                "radius must be a module that maps (audio, text, logit_scale) to a radius, "
                "such as StaticRadius(0.1); "
                f"got {type(radius).__name__}"
            )
        self.radius = radius
        self.options: dict[str, Any] = {
            "objective": objective,
            "bilateral": bilateral,
            "alpha": alpha,
            "beta": beta,
            "normalize": normalize,
            "renormalize": renormalize,
            "reduction": reduction,
            "exchange": exchange,
            "workspace": workspace,
            "backend": backend,
            "return_stats": return_stats,
        }
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
    ) -> Any:
        """The loss (or loss and SVRStats) of audio, text (N, D)."""
        radius, group = None, self.group
        if self.radius is not None:
            check_embeddings(audio, text)
            given = (audio, text, logit_scale, self.options["normalize"], group)
            radius = radius_of(self.radius, *given)
        return fused_svr_loss(
            audio, text, radius, logit_scale, logit_bias, ids=ids, weight=weight, group=group,
            **self.options,
        )  # fmt: skip


__all__ = ["DynamicRadius", "SVRLoss", "StaticRadius", "fused_svr_loss"]
