"""How much memory a call needs, computed from the same sizes as the backends allocate."""

from typing import Any

import torch

from .dispatch import choose, implementation
from .options import Options, check_choices
from .reference import accumulator_dtype


def memory_estimate(
    N: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    radius: bool = True,
    device: str = "cpu",
    backend: str = "auto",
    **options: Any,
) -> int:
    """Bytes of extra memory at the peak of forward and backward, beyond the inputs and the returned
    gradients.

    Args:
        N, D, dtype: of the embeddings.
        radius: whether support vectors are used.
        device, backend: as in `fused_svr_loss`.
        options: objective, bilateral, alpha, beta, normalize, renormalize, reduction, workspace.
    """
    if N < 1 or D < 1:
        raise ValueError(f"N and D must be positive, got N={N}, D={D}")
    name, _ = choose(backend, device, dtype)
    chosen = Options(**options)
    check_choices(
        objective=chosen.objective, bilateral=chosen.bilateral, reduction=chosen.reduction
    )
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be the embeddings' float dtype, got {dtype}")
    if name != "reference":
        return int(implementation(name).memory(N, D, dtype, radius, chosen))
    # Eager autograd: about four matrices for each direction (product, logits, mask, softmax), and
    # their gradients.
    directions = 2 + radius * (1 + (chosen.bilateral != "none"))
    return (4 * directions + 2) * N * N * accumulator_dtype(dtype).itemsize
