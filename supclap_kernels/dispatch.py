"""Which backend computes which call, and why."""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native
from .backends import cpu
from .options import Options, check_choices

GPU_BACKENDS = ("triton", "panel", "cuda")
NO_DEVICE = "no CUDA device"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run on CPU tensors, in its interpreter; it reads the variable once, too."""
SHIM = bool(os.environ.get("SUPCLAP_SHIM"))
"""Those of csrc/cuda run on CPU tensors, in the tests' stand-in for the CUDA run time."""
ON_HOST = {"triton": INTERPRETED, "cuda": SHIM, "panel": INTERPRETED or SHIM}


@functools.cache
def triton_backends() -> tuple[Any, str]:
    """The module with PANEL and TRITON and "ok", or None and why not. Imports Triton."""
    try:
        return importlib.import_module("supclap_kernels.backends.gpu_triton"), "ok"
    except ImportError as error:
        return None, f"Triton is missing ({error}); install it with `pip install triton`"


def triton_state() -> str:
    reason = triton_backends()[1]
    if reason == "ok" and not INTERPRETED and not native.has_device():
        return f"{NO_DEVICE} (Triton's interpreter takes CPU tensors: TRITON_INTERPRET=1)"
    return reason


def cuda_state() -> str:
    if SHIM:
        return "ok"
    found, reason = native.load()
    if found is None:
        return reason
    if not found.built_with_cuda:
        return "not built: no nvcc at install"
    return "ok" if native.has_device() else NO_DEVICE


def panel_state() -> str:
    """The panel engine takes the kernels of either."""
    triton = triton_state()
    return "ok" if triton == "ok" or cuda_state() == "ok" else triton


@functools.cache
def is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


def measured(device: torch.device) -> bool:
    """Whether the CUDA kernels were measured on such a device, and compiled for it."""
    if cuda_state() != "ok" or not hasattr(native.cuda(), "hopper_tile"):
        return False
    index = native.current_device() if device.index is None else device.index
    return index >= 0 and is_hopper(index)


STATES: dict[str, Callable[[], str]] = {
    "reference": lambda: "ok",
    "cpu": lambda: native.load()[1],
    "triton": triton_state,
    "cuda": cuda_state,
    "panel": panel_state,
}
"""Whether each backend can run here: "ok", or why not."""


def available_backends() -> dict[str, str]:
    """Every backend by name: "ok", or why it cannot run here."""
    return {name: state() for name, state in STATES.items()}


@torch.compiler.assume_constant_result
def choose(
    backend: str, where: str | torch.device, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """The backend that runs on this device, and why. Raises where the one asked for cannot."""
    check_choices(backend=backend)
    device = torch.device(where).type
    if backend == "auto":
        cpu = STATES["cpu"]()
        if device == "cpu" and cpu == "ok":
            return (
                "cpu",
                "the panel engine with C++ epilogues: measured faster than eager PyTorch, but for "
                "the plain losses of fewer than 512 pairs",
            )
        if device == "cpu":
            return "reference", f"fallback: {cpu}"
        if device == "cuda" and dtype == torch.float64:
            return "reference", "float64: the kernels compute in float32"
        if device == "cuda" and measured(torch.device(where)):
            return (
                "cuda",
                "one launch where the batch fits on the chip, else what an H200 measured fastest "
                "for 16-bit embeddings",
            )
        if device == "cuda" and panel_state() == "ok":
            return (
                "reference",
                "the GPU backends can run here, but were measured on Hopper only, with kernels "
                "compiled for sm_90a: ask for backend='cuda', 'triton' or 'panel'",
            )
        return "reference", f"fallback: no kernel for {device} tensors here"
    state = STATES[backend]()
    if state != "ok":
        raise RuntimeError(f"backend={backend!r} cannot run here: {state}. Use backend='auto'.")
    if backend == "cpu" and device != "cpu":
        raise RuntimeError(f"backend='cpu' takes CPU tensors, got {device}. Use backend='auto'.")
    if backend in GPU_BACKENDS:
        if device != "cuda" and not (device == "cpu" and ON_HOST[backend]):
            raise RuntimeError(
                f"backend={backend!r} takes CUDA tensors, got {device}. Use backend='auto'."
            )
        if dtype == torch.float64:
            raise RuntimeError(
                f"backend={backend!r} computes in float32; for float64 use backend='reference'."
            )
    return backend, "asked for"


def explain(device: str | torch.device = "cpu", backend: str = "auto") -> str:
    """One line: which backend a call with tensors on this device runs on, and why."""
    name, reason = choose(backend, device)
    return f"{name}: {reason}"


@functools.cache
def implementation(name: str) -> Any:
    """What has `forward`, `backward`, `saved_elements` and `memory` for a backend's name."""
    if name == "cpu":
        return cpu.CPU
    if name == "cuda":
        return importlib.import_module("supclap_kernels.backends.gpu_single").CUDA
    if triton_state() != "ok":
        return importlib.import_module("supclap_kernels.backends.gpu_cuda").CUDA_PANEL
    return getattr(triton_backends()[0], name.upper())


def backend_for(audio: Tensor, options: Options) -> Any:
    """The implementation of the operators for these tensors."""
    return implementation(choose(options.backend, audio.device, audio.dtype)[0])
