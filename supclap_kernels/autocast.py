"""Autocast lowers a program's layers, never what is computed here."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which products with x keep their dtype."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose first argument is the audio embeddings, without autocast."""

    @functools.wraps(function)
    def plainly(audio: Tensor, *arguments: Any, **options: Any) -> Any:
        if not isinstance(audio, Tensor):  # the function says what it needs
            return function(audio, *arguments, **options)
        with autocast_off(audio):
            return function(audio, *arguments, **options)

    return plainly
