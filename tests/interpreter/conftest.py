"""Backends, and speed: the interpreter patches Triton's language at every call inside a kernel, a
third of its time; once for each module is enough, since what a call patches stays patched."""

from pathlib import Path
from typing import Any

import pytest
from covering import thin_out
from triton.runtime import interpreter

patched: set[int] = set()


def call(self: Any, *arguments: Any, **named: Any) -> Any:
    module = id(self.fn.__globals__)
    if module not in patched:
        patched.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **named)


if hasattr(interpreter, "_patch_lang") and hasattr(interpreter.InterpretedFunction, "rewrite"):
    interpreter.InterpretedFunction.__call__ = call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter is slow: without `--all` it runs every third case."""
    thin_out(items, Path(__file__).parent)


@pytest.fixture(params=["panel", "triton"])
def backend(request):
    return request.param
