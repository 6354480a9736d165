"""Which backend computes which call, and why."""

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

from . import native
from .backends import cpu
from .options import Options, check_choices

GPU_BACKENDS = ("triton", "panel")
"""Those that run Triton kernels."""


@functools.cache
def gpu_backends() -> tuple[Any, str]:
    """The module with PANEL and TRITON and "ok", or None and why not. Imports Triton."""
    try:
        return importlib.import_module("supclap_kernels.backends.gpu"), "ok"
    except ImportError as error:
        return None, f"Triton is missing ({error}); install it with `pip install triton`"


def interpreted() -> bool:
    """Whether Triton's kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available_backends() -> dict[str, str]:
    """Every backend by name: "ok", or why it cannot run here."""
    found, reason = native.load()
    if found is None:
        cuda = reason
    elif not found.built_with_cuda:
        cuda = "not built: no nvcc at install"
    else:
        cuda = "not implemented yet: the CUDA kernels of the loss are not in this version"
    gpu = gpu_backends()[1]
    if gpu == "ok" and not torch.cuda.is_available() and not interpreted():
        gpu = "no CUDA device (Triton's interpreter takes CPU tensors: TRITON_INTERPRET=1)"
    return {"reference": "ok", "cpu": reason, "triton": gpu, "cuda": cuda, "panel": gpu}


@torch.compiler.assume_constant_result
def choose(backend: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The backend that runs on this type of device, and the reason. Raises where the one asked for
    cannot.
    """
    check_choices(backend=backend)
    available = available_backends()
    if backend == "auto":
        if device == "cpu" and available["cpu"] == "ok":
            return (
                "cpu",
                "the panel engine with C++ epilogues: measured faster than eager at every size",
            )
        if device == "cpu":
            return "reference", f"fallback: {available['cpu']}"
        if device == "cuda" and available["panel"] == "ok":
            return "reference", "'panel' and 'triton' can run, but are not measured on a GPU yet"
        return "reference", f"fallback: no kernel for {device} tensors here"
    if available[backend] != "ok":
        raise RuntimeError(
            f"backend={backend!r} cannot run here: {available[backend]}. Use backend='auto'."
        )
    if backend == "cpu" and device != "cpu":
        raise RuntimeError(f"backend='cpu' takes CPU tensors, got {device}. Use backend='auto'.")
    if backend in GPU_BACKENDS:
        if device != "cuda" and not (device == "cpu" and interpreted()):
            raise RuntimeError(
                f"backend={backend!r} takes CUDA tensors (CPU tensors only in Triton's "
                f"interpreter, TRITON_INTERPRET=1), got {device}. Use backend='auto'."
            )
        if dtype == torch.float64:
            raise RuntimeError(
                f"backend={backend!r} computes in float32; for float64 use backend='reference'."
            )
    return backend, "asked for"


def explain(device: str | torch.device = "cpu", backend: str = "auto") -> str:
    """One line: which backend a call with tensors on this device runs on, and why."""
    name, reason = choose(backend, torch.device(device).type)
    return f"{name}: {reason}"


def implementation(name: str) -> Any:
    """What has `forward`, `backward`, `saved_elements` and `memory` for a backend's name."""
    if name == "cpu":
        return cpu
    return getattr(gpu_backends()[0], name.upper())


def backend_for(audio: Tensor, options: Options) -> Any:
    """The implementation of the operators for these tensors."""
    return implementation(choose(options.backend, audio.device.type, audio.dtype)[0])
