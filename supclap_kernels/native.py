"""The compiled module: found once, lazily, so that importing the package never fails."""

import functools
import importlib
from types import ModuleType

from torch import Tensor


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The module and "ok", or None and why not."""
    try:
        return importlib.import_module("supclap_kernels._native"), "ok"
    except ImportError as error:
        return None, f"the compiled module is missing ({error}); reinstall with `pip install -e .`"


def module() -> ModuleType:
    found, reason = load()
    if found is None:
        raise RuntimeError(f"supclap_kernels: {reason}")
    return found


def address(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor's first element; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous(), "kernels take contiguous tensors"
    return tensor.data_ptr()
