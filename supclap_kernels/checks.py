"""Every check of an argument and its message: what the loss was given, as the operators take it."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backends.call import Tensors
from .options import Options, as_python_number, check_choices
from .reference import accumulator_dtype
from .watch import watch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def checked_options(*values: Any) -> Options:
    """The options of these values, or the error that says what does not fit."""
    if torch.compiler.is_compiling():
        return with_plain_values(Options(*values))
    try:
        return remembered_options(*values)
    except TypeError:  # not hashable, or of a wrong type, which is told now
        return with_plain_values(Options(*values))


@functools.lru_cache(maxsize=1024, typed=True)
def remembered_options(*values: Any) -> Options:
    """A training loop has the same options in every step."""
    return with_plain_values(Options(*values))


def with_plain_values(options: Options) -> Options:
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
    return Options(
        options.objective, options.bilateral, float(alpha), float(beta), bool(options.normalize),
        bool(options.renormalize), options.reduction, workspace, options.backend,
        bool(options.stats),
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
) -> Tensors:
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
    inputs = Tensors(audio, text, R, scale, bias, ids, weight)
    if any(x is not None and is_lazy(x) for x in inputs):
        given = {name: x for name, x in inputs._asdict().items() if x is not None}
        inputs = inputs._replace(**{name: written_out(x) for name, x in given.items()})
    return inputs


def is_lazy(x: Tensor) -> bool:
    """Whether a tensor's memory does not hold its values: negated in name only, or zeros that have
    no memory. The kernels read memory."""
    return not torch.compiler.is_compiling() and (x.is_neg() or x._is_zerotensor())


def written_out(x: Tensor) -> Tensor:
    """The same values in memory, with autograd."""
    if x._is_zerotensor():
        return x + torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return x.resolve_neg()


def group_size(group: Any) -> int:
    """How many ranks a process group has."""
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
        if type(value) is not Tensor and hasattr(value, "device_mesh"):
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
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {names}, got {value.dtype}")
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
