"""Which backend computes which call, and why."""

from types import ModuleType

import torch
from torch import Tensor

from . import native
from .backends import cpu
from .options import Options, check_choices


def available_backends() -> dict[str, str]:
    """Every backend by name: "ok", or why it cannot run here."""
    found, reason = native.load()
    if found is None:
        cuda = reason
    elif not found.built_with_cuda:
        cuda = "not built: no nvcc at install"
    else:
        cuda = "not implemented yet: the CUDA kernels of the loss are not in this version"
    return {
        "reference": "ok",
        "cpu": reason,
        "triton": "not implemented yet: the Triton kernels are not in this version",
        "cuda": cuda,
        "panel": "not implemented yet: the panel engine has no CUDA epilogue in this version",
    }


@torch.compiler.assume_constant_result
def choose(backend: str, device: str) -> tuple[str, str]:
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
        return "reference", f"fallback: no kernel for {device} tensors in this version"
    if available[backend] != "ok":
        raise RuntimeError(
            f"backend={backend!r} cannot run here: {available[backend]}. Use backend='auto'."
        )
    if backend == "cpu" and device != "cpu":
        raise RuntimeError(f"backend='cpu' takes CPU tensors, got {device}. Use backend='auto'.")
    return backend, "asked for"


def explain(device: str | torch.device = "cpu", backend: str = "auto") -> str:
    """One line: which backend a call with tensors on this device runs on, and why."""
    name, reason = choose(backend, torch.device(device).type)
    return f"{name}: {reason}"


def backend_for(audio: Tensor, options: Options) -> ModuleType:
    """The module whose `forward` and `backward` implement the operators for these tensors."""
    name, _ = choose(options.backend, audio.device.type)
    return {"cpu": cpu}[name]
