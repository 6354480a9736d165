"""One warning for a radius that asks for a gradient and is never trained."""

import warnings
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PATIENCE = 100
"""Training steps that a radius may keep its value for."""
ENOUGH = 1024
"""Elements of a parameter that are compared: an optimizer changes them all, or none."""


@dataclass(slots=True)
class Watch:
    """A parameter as it was when a training step first used it."""

    parameter: "weakref.ref[Tensor]"
    version: int
    value: Tensor
    steps: int = 1
    settled: bool = False
    """It is known to be trained, or was warned of."""


watches: dict[int, Watch] = {}
"""By the parameter's id: copies and pickles of a module know nothing of it."""


def watch(parameter: Tensor) -> None:
    """Count a use of a radius' parameter in a training step, and warn at the 100th one if its value
    never changed.

    A step costs well under a microsecond and reads nothing of a device. An optimizer that writes in
    place counts the parameter's version up, on the host. Fused ones, FSDP2 and writes to `.data` do
    not: so the value itself is compared before the warning, once in a parameter's life.

    A use is a forward pass with gradients: with accumulation over more batches than PATIENCE, or
    an optimizer whose learning rate is 0 for as long, set `supclap_kernels.watch.PATIENCE` higher.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    # Other types than Parameter: a DTensor or a view of FSDP, a tensor of torch.func.
    if not parameter.requires_grad or type(parameter) is not nn.Parameter:
        return
    seen = watches.get(id(parameter))
    if seen is None or seen.parameter() is not parameter:
        begin(parameter)
    elif seen.settled:
        return
    elif parameter._version != seen.version:
        seen.settled = True
    elif seen.steps < PATIENCE:
        seen.steps += 1
    elif not captured(parameter):
        seen.settled = True
        if torch.equal(sample(parameter), seen.value):
            warn(parameter)


def begin(parameter: Tensor) -> None:
    if parameter.is_meta or captured(parameter):
        return
    key, known = id(parameter), watches
    reference = weakref.ref(parameter, lambda _: known.pop(key, None))
    watches[key] = Watch(reference, parameter._version, sample(parameter))


def captured(parameter: Tensor) -> bool:
    """Into a CUDA graph, where nothing can be read."""
    return parameter.is_cuda and torch.cuda.is_current_stream_capturing()


def sample(parameter: Tensor) -> Tensor:
    return parameter.detach().flatten()[:ENOUGH].clone()


def warn(parameter: Tensor) -> None:
    warnings.warn(
        f"a radius asks for a gradient, was used in {PATIENCE} training steps and never changed: "
        f"its parameter, of shape {tuple(parameter.shape)}, seems to be in no optimizer. Hang it "
        "on the model before the optimizer is made, supclap_kernels.attach_radius(model, radius), "
        "or add radius.parameters() to the optimizer; radius.requires_grad_(False) if it is fixed",
        UserWarning,
        stacklevel=4,
    )
