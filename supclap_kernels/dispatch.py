"""Which way computes which call, and why: the only place that chooses ("auto": automatic.py).

A backend that a user names ("triton", "cuda", "panel") has one or several ways, and every way has a
name of its own, by which tests and benchmarks ask for it:

    cpu:small      one native call             cpu:panel      panels with C++ epilogues
    triton:tile    Triton's tile kernels       triton:panel   panels with Triton's epilogues
    cuda:single    one launch, up to what fits on the chip (cuda:single:16, :32, :64 name its tiles)
    cuda:hopper    the sweeps for Hopper       cuda:panel     panels with CUDA's epilogues
    reference      eager PyTorch
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import automatic, native, tables
from .automatic import MODELLED, numbers, treated_as
from .backends import available
from .backends.call import Backend, Route, Tensors
from .backends.cuda import route as cuda_route
from .backends.estimate import Kind
from .backends.machine import Machine, described, device_index, machine_at
from .backends.panel import PLACEHOLDER
from .backends.tile_sizes import CPU_SMALL
from .checks import FLOATS
from .options import Options, check_choices
from .selfcheck import can_check, checked, trusted
from .tables import HERE

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
        return automatic.family(device, dtype)
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


def routes(
    backend: str,
    device: torch.device,
    kind: Kind,
    staged: bool = False,
    machine: Machine | None = None,
) -> tuple[Route, ...]:
    """The ways of such calls by the size of the batch, smallest first; eager PyTorch may be one.

    `staged`: the pass is called stage by stage (distributed.py), so it cannot be one launch.
    `machine`: that "auto" on a GPU is asked for; by default the one of the device.
    """
    if backend == "auto":
        return automatic.routes(device, kind, staged, machine)
    name, reason = choose(backend, device, kind.dtype)
    if name == "triton":
        return (Route("triton:tile", None, reason),)
    if name == "panel":
        takes = device.type == "cuda" or native.on_host()
        cuda = takes and available.state("cuda", device.index) == "ok"
        return (Route("cuda:panel" if cuda else "triton:panel", None, reason),)
    if name.startswith("cpu"):
        return cpu_routes(name, reason, staged)
    if name.startswith("cuda:single"):
        if staged:
            raise RuntimeError(NOT_STAGED.format(name=name, family="cuda", one="one launch"))
        return (cuda_route.single_route(name, device_index(device), kind, reason),)
    if name == "cuda:hopper" and kind.dtype.itemsize != 2:
        raise RuntimeError(
            f"backend={name!r} takes float16 and bfloat16, got {kind.dtype}; use 'cuda'"
        )
    if name != "cuda":
        return (Route(name, None, reason),)
    return tuple(cuda_route.routes(device_index(device), kind, staged))


def cpu_routes(name: str, reason: str, staged: bool) -> tuple[Route, ...]:
    if name == "cpu":
        return automatic.CPU_WAYS[staged:]
    if name == "cpu:small" and staged:
        raise RuntimeError(NOT_STAGED.format(name=name, family="cpu", one="one call"))
    return (Route(name, CPU_SMALL if name == "cpu:small" else None, reason),)


def call_of(
    device: str | torch.device, dtype: torch.dtype, D: int, options: Options, radius: bool
) -> tuple[torch.device, Kind]:
    """What `routes` asks of a call that is only described; "cuda" is the current device."""
    where = torch.device(device)
    if where.type == "cuda" and native.has_device():
        where = torch.device("cuda", device_index(where))
    return where, Kind(D, dtype, options.mode(radius), options.infonce)


class Remembered(NamedTuple):
    """A kind of call: what its ways depend on, and nothing that changes from step to step."""

    backend: str
    device: torch.device
    kind: Kind
    staged: bool
    threads: int


@functools.lru_cache(maxsize=1024)
def remembered_routes(call: Remembered) -> tuple[Route, ...]:
    """... from the first call of a kind on: what memory was free then counts."""
    return routes(call.backend, call.device, call.kind, call.staged)


@functools.lru_cache(maxsize=1024)
def remembered_kernels(call: Remembered) -> tuple[Route, ...]:
    """The same of an operator, whose choice is a constant of compiled programs."""
    if call.backend == "auto":
        return automatic.kernels(call.device, call.kind)
    return routes(call.backend, call.device, call.kind)


def forget() -> None:
    """The ways that are remembered; direct.py's `forget` forgets its own, too."""
    remembered_routes.cache_clear()
    remembered_kernels.cache_clear()


def remembered_as(
    audio: Tensor, radius: bool, options: Options, staged: bool = False
) -> Remembered:
    D = audio.shape[1]
    if type(D) is not int:  # a compiler's symbol, for which a number would be a constant
        asks = options.backend.startswith("cuda") or (options.backend == "auto" and audio.is_cuda)
        D = int(D) if asks else 0
    kind = Kind(D, audio.dtype, options.mode(radius), options.infonce)
    return Remembered(options.backend, audio.device, kind, staged, torch.get_num_threads())


def of_call(inputs: Tensors, options: Options, staged: bool = False) -> Remembered:
    return remembered_as(inputs.audio, inputs.radius is not None, options, staged)


def runs_reference(inputs: Tensors, options: Options, staged: bool = False) -> bool:
    """Whether eager PyTorch computes the loss of these tensors."""
    audio = inputs.audio
    if torch.compiler.is_compiling():
        return choose(options.backend, audio.device, audio.dtype)[0] == "reference"
    ways = remembered_routes(of_call(inputs, options, staged))
    way = ways[-1].way if staged else route(len(audio), ways).way
    if way == "reference":
        return True
    return not is_trusted(way, audio, inputs.radius is not None, options)


def is_trusted(way: str, audio: Tensor, radius: bool, options: Options) -> bool:
    """Whether a way may be used for such embeddings: one that "auto" chose for a GPU must pass its
    self-check first, which holds for every D."""
    if options.backend != "auto" or not audio.is_cuda:
        return True
    kind = Kind(0, audio.dtype, options.mode(radius), options.infonce)
    return trusted(way, implementation(way), audio.device, kind)


def refuse_unproven(inputs: Tensors, options: Options) -> None:
    """Of a compiled call, which did not ask `runs_reference`: an error, not eager PyTorch."""
    audio = inputs.audio
    if options.backend != "auto" or not audio.is_cuda or not can_check(audio.device):
        return
    way = route(len(audio), remembered_kernels(of_call(inputs, options))).way
    if not is_trusted(way, audio, inputs.radius is not None, options):
        raise RuntimeError(
            f"{way} failed its self-check on {audio.device}, and a compiled call cannot change its "
            "backend; use backend='reference'"
        )


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


def way_for(inputs: Tensors, options: Options) -> str:
    """What computes a call that is neither eager PyTorch's nor an operator's."""
    ways = remembered_routes(of_call(inputs, options))
    return route(len(inputs.audio), ways).way


def operator_way(inputs: Tensors, options: Options) -> str:
    """What computes the operators for these tensors."""
    ways = remembered_kernels(of_call(inputs, options))
    return route(len(inputs.audio), ways).way


def staged_way(inputs: Tensors, options: Options) -> str:
    """What computes a pass over a process group, stage by stage."""
    return remembered_routes(of_call(inputs, options, staged=True))[-1].way


def saved_elements(inputs: Tensors, options: Options, keep: bool) -> Any:
    """Length of the buffer that forward leaves for backward. N may be symbolic: no branch depends
    on it, so that torch.compile compiles once for every N."""
    N, D = inputs.audio.shape
    call = (D, inputs.audio.dtype, inputs.radius is not None, options, keep)
    *smaller, last = remembered_kernels(of_call(inputs, options))
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
    capability: tuple[int, int] | None = None,
    built: Sequence[str] | None = None,
    memory: int | None = None,
) -> str:
    """One line: which way takes such a call on this device, and why.

    Args:
        device, backend: as in `fused_svr_loss`.
        N, D, dtype: of the embeddings; without N the ways of every size are named.
        objective, bilateral: as in `fused_svr_loss`.
        radius: whether there are support vectors.
        capability: compute capability of a GPU that need not be here, such as (8, 0): what "auto"
            would take on it.
        built: which of "cuda" and "triton" would be installed there; default both.
        memory: bytes that would be free there; default all that such a card has.

    Raises:
        TypeError, ValueError: arguments that describe no call. RuntimeError: a backend that cannot
            run here.
    """
    check_choices(objective=objective, bilateral=bilateral)
    check_described(N, D, dtype)
    options = Options(objective=objective, bilateral=bilateral)
    if capability is not None:
        if backend != "auto" or torch.device(device).type not in ("cpu", "cuda"):
            raise ValueError(
                "capability asks what 'auto' takes on a CUDA GPU that need not be here; got "
                f"device={str(device)!r}, backend={backend!r}"
            )
        device = "cuda"
    elif built is not None or memory is not None:
        raise ValueError("built and memory describe a GPU; name its compute capability, too")
    where, kind = call_of(device, dtype, D, options, radius)
    machine = None if capability is None else described(capability, built, memory)
    ways = routes(backend, where, kind, machine=machine)
    if N is None:
        steps = [
            f"{way.way}{'' if way.largest is None else f' up to N = {way.largest}'}: {way.reason}"
            for way in ways
        ]
        return "; then ".join(steps)
    way, asked = route(N, ways), treated_as(N, ways)
    line = f"{way.way}: {way.reason}"
    if way.reason == HERE:
        table = tables.load(where)
        measured = None if table is None else table.of(kind)
        line += "" if measured is None else f" ({measured.numbers(asked)})"
    elif way.reason in MODELLED:
        model = machine or machine_at(device_index(where))
        line += f" ({numbers(model, kind, asked, way.way)})"
    on_this_gpu = backend == "auto" and where.type == "cuda" and machine is None
    return f"{line}; {checked(way.way, where, kind)}" if on_this_gpu else line


def check_described(N: int | None, D: int, dtype: torch.dtype) -> None:
    """Raises unless there can be embeddings (N, D) of this dtype."""
    for name, size in (("N", 1 if N is None else N), ("D", D)):
        if type(size) is not int:
            raise TypeError(f"{name} must be a number of rows or columns, got {size!r}")
        if not 0 < size < 2**31:
            raise ValueError(f"{name} must be positive and below 2**31, got {size}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be the embeddings' float dtype, got {dtype}")
