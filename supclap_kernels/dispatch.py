"""Which way computes which call, and why: the only place that chooses.

A backend that a user names ("triton", "cuda", "panel") has one or several ways, and every way has a
name of its own, by which tests and benchmarks ask for it:

    cpu:small      one native call                 cpu:panel      panels with C++ epilogues
    triton:tile    Triton's tile kernels               triton:panel   panels with Triton's epilogues
    cuda:single    one launch, up to what fits on the chip (cuda:single:16, :32, :64 name its tiles)
    cuda:hopper    the sweeps for Hopper               cuda:panel     panels with CUDA's epilogues
    reference      eager PyTorch
"""

import functools
from typing import Any

import torch

from . import native
from .backends import available
from .backends.call import Backend, Route, Tensors
from .backends.cuda import route as cuda_route
from .backends.panel import PLACEHOLDER
from .backends.tile_sizes import CPU_SMALL
from .options import PLAIN, Options, check_choices

NOT_STAGED = "backend={name!r} is {one} for the batch of one process; with a group use {family!r}"


def available_backends() -> dict[str, str]:
    """Every backend by name: "ok", or why it cannot run here."""
    return {name: available.state(name) for name in available.FAMILIES}


def choose(
    backend: str, where: str | torch.device, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """The name of the backend or way for tensors on this device, and why; "auto" never is.

    Raises ValueError for an unknown name, RuntimeError where the one asked for cannot run.
    """
    check_choices(backend=backend)
    device = torch.device(where)
    if backend == "auto":
        return choose_automatically(device, dtype)
    family = backend.partition(":")[0]
    reason = available.state(backend, device.index)
    if reason != "ok":
        raise RuntimeError(f"backend={backend!r} cannot run here: {reason}. Use backend='auto'.")
    if family == "cpu" and device.type != "cpu":
        raise RuntimeError(
            f"backend='cpu' takes CPU tensors, got {device.type}. Use backend='auto'."
        )
    if family in ("triton", "cuda", "panel"):
        on_host = device.type == "cpu" and available.takes_cpu_tensors(family)
        if device.type != "cuda" and not on_host:
            raise RuntimeError(
                f"backend={backend!r} takes CUDA tensors, got {device.type}. Use backend='auto'."
            )
        if dtype == torch.float64:
            raise RuntimeError(
                f"backend={backend!r} computes in float32; for float64 use backend='reference'."
            )
    return backend, "asked for"


# A compiled call takes the answer as a constant. torch.compiler.assume_constant_result sets this
# attribute, too, but imports the whole compiler.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_automatically(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if device.type == "cpu":
        reason = available.state("cpu")
        if reason != "ok":
            return "reference", f"fallback: {reason}"
        return "cpu", "panels with C++ epilogues"
    if device.type != "cuda":
        return "reference", f"fallback: no kernel for {device.type} tensors here"
    if dtype == torch.float64:
        return "reference", "float64: the kernels compute in float32"
    if available.hopper(device.index) == "ok":
        return "cuda", "the CUDA kernels: measured on an H200"
    if available.state("panel") == "ok":
        return (
            "reference",
            "the GPU backends can run here, but were measured on Hopper only, with kernels "
            "compiled for sm_90a: ask for backend='cuda', 'triton' or 'panel'",
        )
    return "reference", "fallback: no kernel for cuda tensors here"


def routes(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    D: int,
    mode: int,
    infonce: bool,
    staged: bool = False,
) -> tuple[Route, ...]:
    """The ways of such calls by the size of the batch, smallest first.

    `staged`: the pass is called stage by stage (distributed.py), so it cannot be one launch.
    """
    name, reason = choose(backend, device, dtype)
    if name == "triton":
        return (Route("triton:tile", None, reason),)
    if name == "panel":
        takes = device.type == "cuda" or native.on_host()
        way = "cuda:panel" if takes and available.cuda() == "ok" else "triton:panel"
        return (Route(way, None, reason),)
    if name.startswith("cpu"):
        return cpu_routes(name, reason, staged)
    call = (device_index(device), dtype, D, mode, infonce)
    if name.startswith("cuda:single"):
        if staged:
            raise RuntimeError(NOT_STAGED.format(name=name, family="cuda", one="one launch"))
        return (cuda_route.single_route(name, *call, reason),)
    if name == "cuda:hopper" and dtype.itemsize != 2:
        raise RuntimeError(f"backend={name!r} takes float16 and bfloat16, got {dtype}; use 'cuda'")
    if name != "cuda":
        return (Route(name, None, reason),)
    *smaller, large = cuda_route.routes(*call, staged)
    if backend == "auto" and mode == PLAIN and infonce and dtype.itemsize == 2:
        if available.triton() == "ok":
            reason = "measured fastest on an H200 for large batches of the plain InfoNCE in 16 bits"
            large = Route("triton:tile", None, reason)
    return *smaller, large


def cpu_routes(name: str, reason: str, staged: bool) -> tuple[Route, ...]:
    small = Route("cpu:small", CPU_SMALL, "one native call, since the batch is small")
    large = Route("cpu:panel", None, "panels with C++ epilogues; measured faster than eager")
    if name == "cpu":
        return (large,) if staged else (small, large)
    if name == "cpu:small" and staged:
        raise RuntimeError(NOT_STAGED.format(name=name, family="cpu", one="one call"))
    return ((small if name == "cpu:small" else large)._replace(reason=reason),)


def device_index(device: torch.device) -> int:
    """Of a CUDA device; -1 on the host."""
    if device.type != "cuda":
        return -1
    return native.current_device() if device.index is None else device.index


def call_of(
    device: str | torch.device, dtype: torch.dtype, D: int, options: Options, radius: bool
) -> tuple[torch.device, torch.dtype, int, int, bool]:
    """What `routes` asks of a call that is only described; "cuda" is the current device."""
    where = torch.device(device)
    if where.type == "cuda" and native.has_device():
        where = torch.device("cuda", device_index(where))
    return where, dtype, D, options.mode(radius), options.infonce


def routes_of(inputs: Tensors, options: Options, staged: bool = False) -> tuple[Route, ...]:
    audio = inputs.audio
    D = audio.shape[1]
    if type(D) is not int:  # a compiler's symbol; only what fits on a chip depends on it
        name = choose(options.backend, audio.device, audio.dtype)[0]
        D = int(D) if name.startswith("cuda") else 0
    return remembered_routes(
        options, audio.device, audio.dtype, D, inputs.radius is not None, staged
    )


@functools.lru_cache(maxsize=1024)
def remembered_routes(
    options: Options, device: torch.device, dtype: torch.dtype, D: int, radius: bool, staged: bool
) -> tuple[Route, ...]:
    mode = options.mode(radius)
    return routes(options.backend, device, dtype, D, mode, options.infonce, staged)


def runs_reference(inputs: Tensors, options: Options) -> bool:
    """Whether eager PyTorch computes the loss of these tensors."""
    if torch.compiler.is_compiling():
        audio = inputs.audio
        return choose(options.backend, audio.device, audio.dtype)[0] == "reference"
    return routes_of(inputs, options)[0].way == "reference"


def route(N: int, ways: tuple[Route, ...]) -> Route:
    """The way of a batch of N pairs. Raises RuntimeError where it fits none of them."""
    for way in ways:
        if way.largest is None or N <= way.largest:
            return way
    raise RuntimeError(
        f"backend={ways[-1].way!r} takes up to {ways[-1].largest} pairs here, got {N}; use "
        f"{ways[-1].way.partition(':')[0]!r}"
    )


@functools.cache
def implementation(way: str) -> Backend:
    """What computes a way; imports it."""
    family, _, kind = way.partition(":")
    if family == "cpu":
        from .backends.cpu import call, small

        return small.SMALL if kind == "small" else call.CPU
    if family == "triton":
        from .backends.triton import call as triton

        return triton.PANEL if kind == "panel" else triton.TILE
    from .backends.cuda import single, sweeps

    if kind.startswith("single"):
        return single.Single(single.side_of(way))
    return sweeps.HOPPER if kind == "hopper" else sweeps.PANEL


def backend_for(inputs: Tensors, options: Options) -> Backend:
    """What computes the operators for these tensors."""
    return implementation(route(len(inputs.audio), routes_of(inputs, options)).way)


def staged_backend(inputs: Tensors, options: Options) -> Backend:
    """What computes a pass over a process group, stage by stage."""
    return implementation(routes_of(inputs, options, staged=True)[-1].way)


def saved_elements(inputs: Tensors, options: Options, keep: bool) -> Any:
    """Length of the buffer that forward leaves for backward. N may be symbolic: no branch depends
    on it, so that torch.compile compiles once for every N."""
    N, D = inputs.audio.shape
    call = (D, inputs.audio.dtype, inputs.radius is not None, options, keep)
    *smaller, last = routes_of(inputs, options)
    elements = implementation(last.way).saved_elements(N, *call) - PLACEHOLDER
    for way in reversed(smaller):
        assert way.largest is not None
        own = implementation(way.way).saved_elements(N, *call) - PLACEHOLDER
        fits, exceeds = way.largest // N, N // (way.largest + 1)
        elements = torch.sym_min(1, fits) * own + torch.sym_min(1, exceeds) * elements
    return elements + PLACEHOLDER  # a sum of what a compiler can see is not negative


def explain(
    device: str | torch.device = "cpu",
    backend: str = "auto",
    *,
    N: int | None = None,
    D: int = 512,
    dtype: torch.dtype = torch.float32,
    objective: str = "infonce",
    bilateral: str = "mirror",
    radius: bool = True,
) -> str:
    """One line: which way takes such a call on this device, and why.

    Args:
        device, backend: as in `fused_svr_loss`.
        N, D, dtype: of the embeddings; without N the ways of every size are named.
        objective, bilateral: as in `fused_svr_loss`.
        radius: whether there are support vectors.
    """
    check_choices(objective=objective, bilateral=bilateral)
    options = Options(objective=objective, bilateral=bilateral)
    ways = routes(backend, *call_of(device, dtype, D, options, radius))
    if N is not None:
        way = route(N, ways)
        return f"{way.way}: {way.reason}"
    steps = [
        f"{way.way}{'' if way.largest is None else f' up to N = {way.largest}'}: {way.reason}"
        for way in ways
    ]
    return "; then ".join(steps)


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
    settings = Options(**options)
    check_choices(
        objective=settings.objective, bilateral=settings.bilateral, reduction=settings.reduction
    )
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be the embeddings' float dtype, got {dtype}")
    way = route(N, routes(backend, *call_of(device, dtype, D, settings, radius))).way
    if way != "reference":
        from .backends.footprint import peak_bytes

        return peak_bytes(implementation(way), N, D, dtype, radius, settings)
    # Eager autograd: about four matrices for each direction (product, logits, hidden pairs,
    # softmax), and their gradients.
    directions = 2 + radius * (1 + (settings.bilateral != "none"))
    itemsize = max(4, dtype.itemsize)
    return (4 * directions + 2) * N * N * itemsize
