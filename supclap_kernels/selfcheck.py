"""Before backend="auto" first uses a way on a GPU: one small case against the specification.

The kernels were proven on the machines of their authors. This proves them on the machine that is
going to train, once in a process, for each way, dtype and mode: some ten milliseconds.
"""

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor

from .backends.call import Backend, Tensors
from .backends.estimate import Kind
from .options import MIRROR, PLAIN, SHARED, Options
from .testing import Case, Inputs, Outputs, baseline, floors, make_inputs, truth, violations

ROWS = {True: 96, False: 200}
"""Of the case: one launch, or more than one tile."""


def case_of(kind: Kind, rows: int) -> Case:
    bilateral = {MIRROR: "mirror", SHARED: "shared"}.get(kind.mode, "none")
    objective = "infonce" if kind.infonce else "siglip"
    return Case(
        N=rows, D=72, dtype=kind.dtype, radius="none" if kind.mode == PLAIN else "scalar",
        options={"objective": objective, "bilateral": bilateral},
    )  # fmt: skip


def outputs(backend: Backend, case: Case, inputs: Inputs) -> Outputs:
    """Loss and gradients, by the backend's own forward and backward."""
    tensors = Tensors(
        inputs.audio, inputs.text, inputs.radius, inputs.logit_scale, inputs.logit_bias, None, None
    )
    needs = tuple(x is not None for x in tensors[:5])
    options = Options(**case.options, workspace=0)
    with torch.no_grad():
        loss, _, state, saved = backend.forward(tensors, options, needs)
        gradients = backend.backward(tensors, options, needs, inputs.upstream, state, saved)
    every: tuple[Tensor | None, ...] = (loss, *gradients)
    names = ("loss", "audio", "text", "radius", "logit_scale", "logit_bias")
    return {name: x for name, x in zip(names, every, strict=True) if x is not None}


def failure(backend: Backend, device: torch.device, kind: Kind, rows: int) -> str:
    """Why the acceptance rule of testing.py rejects the case; empty if it accepts it."""
    case = case_of(kind, rows)
    as_they_are = torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: x
    )  # not a caller's
    try:
        with torch.inference_mode(False), torch.enable_grad(), as_they_are:
            with torch.autocast(device.type, enabled=False):
                inputs = make_inputs(case, str(device))
                result, exact = outputs(backend, case, inputs), truth(case, inputs)
                base = baseline(case, inputs, rounded_weights=kind.dtype.itemsize == 2)
                reasons = violations(result, exact, base, floors(case, inputs, exact))
    except Exception as error:  # of a compiler or a driver: the way is no good here
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "; ".join(reasons)


def can_check(device: torch.device) -> bool:
    """Not while a graph is captured, nor where operations are looked at instead of done."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


CHECKED: dict[tuple[str, torch.device, torch.dtype, int, bool], bool] = {}
"""Whether a way passed, by what was checked."""


def key_of(way: str, device: torch.device, kind: Kind) -> tuple[Any, ...]:
    return way, device, kind.dtype, kind.mode, kind.infonce


def trusted(way: str, backend: Backend, device: torch.device, kind: Kind) -> bool:
    """Whether a way may be used: it passed before, or passes now. One that fails is warned of."""
    key = key_of(way, device, kind)
    known = CHECKED.get(key)
    if known is not None:
        return known
    if not can_check(device):
        return False
    rows = ROWS[way.startswith("cuda:single")]
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        reason = failure(backend, device, kind, rows)
    CHECKED[key] = not reason
    if reason:
        warnings.warn(
            f"supclap_kernels: {way} failed its self-check on {device} ({kind.dtype}, "
            f"{case_of(kind, rows)}): {reason}. Eager PyTorch computes these calls instead; please "
            "report it.",
            stacklevel=2,
        )
    return not reason


def checked(way: str, device: torch.device, kind: Kind) -> str:
    """What `explain` says of it."""
    if way == "reference":
        return "needs no check"
    known = CHECKED.get(key_of(way, device, kind))
    if known is None:
        return "checked here when it is first used"
    return "checked here" if known else "failed its check here: eager PyTorch instead"
