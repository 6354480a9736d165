"""The compiled module: found once, lazily, so that importing the package never fails."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The module and "ok", or None and why not."""
    try:
        return importlib.import_module("supclap_kernels._native"), "ok"
    except ImportError as error:
        return None, f"the compiled module is missing ({error}); reinstall with `pip install -e .`"


def module() -> ModuleType:
    compiled, reason = load()
    if compiled is None:
        raise RuntimeError(f"supclap_kernels: {reason}")
    return compiled


_on_host: Any = None


def stand_in(launchers: Any) -> None:
    """From now on `launchers` launch the kernels of csrc/cuda, and take CPU tensors: the kernels
    compiled for the host (tests/shim), or launches that do nothing (bench/host.py)."""
    global _on_host
    _on_host = launchers
    cuda.cache_clear()


@functools.cache
def load_stand_in() -> None:
    """Loads the module that the environment variable SUPCLAP_SHIM names, if it names one."""
    path = os.environ.get("SUPCLAP_SHIM")
    if not path:
        return
    spec = importlib.util.spec_from_file_location("supclap_shim", path)
    assert spec is not None and spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    stand_in(shim.cuda)


def on_host() -> bool:
    """Whether the kernels of csrc/cuda take CPU tensors here."""
    load_stand_in()
    return _on_host is not None


@functools.cache
def cuda() -> Any:
    """What launches the kernels of csrc/cuda."""
    return _on_host if on_host() else module().cuda


class Unlaunched:
    """A compiled module whose functions do nothing but those that only calculate."""

    CALCULATE = ("CpuProblem", "CudaProblem", "SingleCalls", "plan_single", "single_limit")

    def __init__(self, launchers: Any) -> None:
        self.launchers = launchers

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.launchers, name)
        return value if name in self.CALCULATE or not callable(value) else lambda *_: None


@functools.cache
def has_device() -> bool:
    """Whether there is a CUDA device; asked once."""
    return torch.cuda.is_available()


def current_device() -> int:
    """The index of the current CUDA device; -1 without one."""
    return torch.cuda.current_device() if has_device() else -1


def stream(device: torch.device) -> int:
    """The current stream's address; 0 on the host."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def address(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor's first element; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous(), "kernels take contiguous tensors"
    return tensor.data_ptr()
