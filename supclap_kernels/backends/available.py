"""What can run on this machine, and why not.

The compiled module and Triton are imported when they are first asked for, so that importing the
package neither fails nor takes long without them.
"""

import functools
import importlib
import os

import torch

from .. import native

NO_DEVICE = "no CUDA device"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels take CPU tensors, in its interpreter; Triton reads the variable once, too."""
FAMILIES = ("reference", "cpu", "triton", "cuda", "panel")
"""The backends that a user can name; "panel" is CUDA's or Triton's."""


@functools.cache
def triton_error() -> str:
    """Why Triton cannot be imported; empty if it can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is missing ({error}); install it with `pip install triton`"
    return ""


def triton() -> str:
    if triton_error():
        return triton_error()
    if INTERPRETED or native.has_device():
        return "ok"
    return f"{NO_DEVICE} (Triton's interpreter takes CPU tensors: TRITON_INTERPRET=1)"


def cuda() -> str:
    if native.on_host():
        return "ok"
    module, reason = native.load()
    if module is None:
        return reason
    if not module.built_with_cuda:
        return "not built: no nvcc at install"
    return "ok" if native.has_device() else NO_DEVICE


def compiled_for(capability: tuple[int, int]) -> bool:
    """Whether the module's machine code, or its PTX, runs on a device of this capability."""
    if native.on_host():
        return True
    number = 10 * capability[0] + capability[1]
    for target in native.cuda().architectures():
        name, _, ptx = target.partition("+")
        base = int(name.rstrip("af"))
        same_family = number // 10 == base // 10 and number >= base
        if number == base or (same_family and not name.endswith("a")) or (ptx and number >= base):
            return True
    return False


def cuda_on(index: int | None) -> str:
    """Whether the kernels of csrc/cuda run on this device (default: the current one)."""
    if cuda() != "ok" or native.on_host():
        return cuda()
    here = capability(native.current_device() if index is None else index)
    if compiled_for(here):
        return "ok"
    targets = ", ".join(native.cuda().architectures())
    return f"not built for compute capability {here[0]}.{here[1]}: installed with {targets}"


def hopper(index: int | None = None) -> str:
    """Whether the kernels for Hopper run on this device (default: the current one)."""
    if cuda() != "ok":
        return cuda()
    if not hasattr(native.cuda(), "hopper_tile"):
        return "not built: installed without target 90a"
    if native.on_host():
        return "ok"
    index = native.current_device() if index is None else index
    return "ok" if capability(index) == (9, 0) else "the device is no Hopper GPU"


@functools.cache
def capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def state(name: str, index: int | None = None) -> str:
    """Whether a backend or a way can run here, on the CUDA device `index` (default: the current
    one): "ok", or why not."""
    family, _, kind = name.partition(":")
    if family == "reference":
        return "ok"
    if family == "cpu":
        return native.load()[1]
    if family == "triton":
        return triton()
    if family == "panel" and cuda_on(index) != "ok":
        return triton()
    return hopper(index) if kind == "hopper" else cuda_on(index)


def takes_cpu_tensors(family: str) -> bool:
    """Whether the kernels of a GPU run on the host here: in Triton's interpreter, or in the tests'
    stand-in for the CUDA run time."""
    if family == "triton":
        return INTERPRETED
    return native.on_host() or (family == "panel" and INTERPRETED)
