"""The options of one call, as the operators and the backends pass them on."""

import numbers
from typing import Any, NamedTuple

WORKSPACE = 256 * 2**20
"""Bytes that the engine may use for similarities, where nothing is said."""
CHOICES = {
    "objective": ("infonce", "siglip"),
    "bilateral": ("none", "mirror", "shared"),
    "reduction": ("mean", "sum", "none"),
    "exchange": ("gather", "ring"),
    "backend": ("auto", "reference", "cpu", "triton", "cuda", "panel"),
}


WAYS = (
    "cpu:small", "cpu:panel",
    "triton:tile", "triton:panel", "cuda:panel", "cuda:hopper",
    "cuda:single", "cuda:single:16", "cuda:single:32", "cuda:single:64",
)  # fmt: skip
"""What `backend` may name besides, for tests and benchmarks: the ways of dispatch.py."""


def check_choices(**choices: str) -> None:
    """Raise ValueError for an option that is none of its CHOICES."""
    for name, value in choices.items():
        if value not in CHOICES[name] and not (name == "backend" and value in WAYS):
            listed = ", ".join(repr(choice) for choice in CHOICES[name])
            raise ValueError(f"{name} must be one of {listed}; got {value!r}")


def as_python_number(value: Any) -> Any:
    """Numbers of other libraries (numpy's, arrays without dimensions, fractions) as Python's; all
    else as it is."""
    if isinstance(value, int | float):
        return value
    if hasattr(value, "__array_interface__") and value.ndim == 0:
        value = value.item()
    is_other_real = isinstance(value, numbers.Real) and not isinstance(value, int | float)
    return float(value) if is_other_real else value


PLAIN, ONE_SIDED, SHARED, MIRROR = range(4)
"""The modes of the support vectors, as the kernels number them; PLAIN has none."""


class Options(NamedTuple):
    """Plain values only: they cross the operator boundary one by one, in this order."""

    objective: str = "infonce"
    bilateral: str = "mirror"
    alpha: float = 1.0
    beta: float = 0.0
    normalize: bool = False
    renormalize: bool = True
    reduction: str = "mean"
    workspace: int = WORKSPACE
    backend: str = "auto"
    stats: bool = False
    """the forward pass also returns the values of SVRStats"""

    @property
    def infonce(self) -> bool:
        return self.objective == "infonce"

    def support(self, has_radius: bool) -> bool:
        """Whether support vectors enter the similarity at all."""
        return has_radius and (self.alpha != 0.0 or self.stats)

    def mirror(self, has_radius: bool) -> bool:
        return self.support(has_radius) and self.bilateral == "mirror"

    def shared(self, has_radius: bool) -> bool:
        return self.support(has_radius) and self.bilateral == "shared" and self.infonce

    def mode(self, has_radius: bool) -> int:
        """PLAIN, ONE_SIDED, SHARED or MIRROR."""
        if not self.support(has_radius):
            return PLAIN
        if self.mirror(has_radius):
            return MIRROR
        return SHARED if self.shared(has_radius) else ONE_SIDED

    def grams(self, has_radius: bool) -> int:
        """How many of the Gram matrices Q = A A^T and K = T T^T the mode needs."""
        return self.support(has_radius) + self.mirror(has_radius)

    @property
    def gradient_in_forward(self) -> bool:
        """SigLIP needs no normaliser, so one sweep gives the loss and its gradient; the upstream
        gradient of a reduced loss is one number and is applied afterwards."""
        return not self.infonce and self.reduction != "none"


OPTION_NAMES = (*Options._fields[:7], "exchange", *Options._fields[7:9], "return_stats")
"""The options of a loss by the names that users give them, in the order they are shown."""
