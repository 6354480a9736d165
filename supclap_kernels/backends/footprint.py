"""How much memory a pass needs: it is run on meta tensors, which have sizes but no memory, and the
bytes that are alive are counted. Kernels are not launched, and of all tile pairs a sweep visits
two.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..options import Options
from ..reference import accumulator_dtype
from .call import Backend, Tensors


class Footprint(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as these live."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.counted = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        result = operation(*arguments, **(named or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.is_meta:
                self.count(x.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.counted:
            return
        self.counted.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, address: int, size: int) -> None:
        self.counted.remove(address)
        self.alive -= size


Step = Callable[[Tensors, tuple[bool, ...], Tensor], Sequence[Tensor | None]]
"""Forward and backward: inputs, which gradients are needed, the upstream gradient -> gradients."""


def whole_pass(backend: Backend, options: Options) -> Step:
    """Forward and backward of a backend in one call each."""

    def step(inputs: Tensors, needs: tuple[bool, ...], upstream: Tensor) -> Sequence[Tensor | None]:
        state, saved = backend.forward(inputs, options, needs)[2:]
        return backend.backward(inputs, options, needs, upstream, state, saved)

    return step


def peak_bytes(
    step: Step,
    N: int,
    D: int,
    dtype: torch.dtype,
    has_radius: bool,
    options: Options,
    beside: Sequence[Tensor] = (),
) -> int:
    """Bytes at the peak of a step, beyond the inputs, what is `beside` them, and the returned
    gradients."""
    audio, text = (torch.empty(N, D, dtype=dtype, device="meta") for _ in range(2))
    wide = accumulator_dtype(dtype)
    radius = torch.empty((), dtype=wide, device="meta") if has_radius else None
    shape = (N,) if options.reduction == "none" else ()
    upstream = torch.empty(shape, dtype=wide, device="meta")
    scale = torch.ones((), dtype=wide, device="cpu")  # a CPU reads it
    inputs = Tensors(audio, text, radius, scale, None, None, None)
    needs = (True, True, has_radius, True, False)
    given = [x for x in (audio, text, radius, upstream, *beside) if x is not None]
    with Footprint(*given) as footprint:
        gradients = step(inputs, needs, upstream)
    return footprint.peak - sum(x.nbytes for x in gradients if x is not None)
