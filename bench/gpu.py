"""`python -m bench.gpu large|small --out FOLDER`: the matrix on a GPU, into FOLDER/large.csv and so
on, and FOLDER/env.json. `bash bench/gpu.sh` runs it.

Time: CUDA events around forward and backward, peers in turns, median of at least 10 rounds. Memory:
the allocator's peak beyond the inputs and the returned gradients. A peer passes the acceptance rule
(N = 1024) before it is timed; one that runs out of memory is
a row without numbers.
"""

import argparse
import csv
import importlib.util
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import supclap_kernels as sk
from supclap_kernels import native, testing
from supclap_kernels.backends import gpu_hopper

from . import peers
from .run import commit

GIB = 2**30
WARM_UP, ROUNDS = 3, 10
BUDGET_MS = 12_000.0
"""A peer whose rounds would take longer than this gets fewer, 3 at least."""


def fused(
    backend: str, workspace: int = 256 * 2**20, hopper: bool = False
) -> Callable[..., peers.Loss | None]:
    """`hopper`: with the kernels for Hopper, if they are there, whatever the mode; else without."""

    def build(objective: str, bilateral: str, plain: bool) -> peers.Loss | None:
        given = {"objective": objective, "bilateral": bilateral, "backend": backend}
        if hopper and not hasattr(native.cuda(), "hopper_tile"):
            return None

        def loss(audio: Tensor, text: Tensor, radius: Tensor, *scalars: Tensor) -> Tensor:
            gpu_hopper.WANTED = gpu_hopper.ALONE = hopper  # until the next one's forward
            R = None if plain else radius
            return sk.fused_svr_loss(audio, text, R, *scalars, workspace=workspace, **given)

        return loss

    return build


def literal(compiled: bool) -> Callable[..., peers.Loss]:
    def build(objective: str, bilateral: str, plain: bool) -> peers.Loss:
        loss = peers.eager(objective, bilateral)
        if plain:
            loss = plain_siglip if objective == "siglip" else plain_infonce
        return torch.compile(loss, dynamic=False) if compiled else loss

    return build


def plain_infonce(audio: Tensor, text: Tensor, radius: Tensor, scale: Tensor) -> Tensor:
    """open_clip's loss, as the sum of both directions."""
    labels = labels_of(text)
    logits = scale * text @ audio.t()
    entropy = torch.nn.functional.cross_entropy
    return entropy(logits, labels) + entropy(logits.t(), labels)


def plain_siglip(
    audio: Tensor, text: Tensor, radius: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """The sigmoid loss over all pairs."""
    signs = 2.0 * torch.eye(len(text), dtype=text.dtype, device=text.device) - 1.0
    logits = scale * text @ audio.t() + bias
    return -torch.nn.functional.logsigmoid(signs * logits).sum() / len(text)


def labels_of(text: Tensor) -> Tensor:
    return torch.arange(len(text), device=text.device)


def native_infonce(audio: Tensor, text: Tensor, radius: Tensor, scale: Tensor) -> Tensor:
    """PyTorch's own chunked product and cross entropy, once for each direction."""
    entropy = torch.nn.functional.linear_cross_entropy
    labels = labels_of(text)
    return entropy(scale * text, audio, labels) + entropy(scale * audio, text, labels)


def inf_cl_infonce(audio: Tensor, text: Tensor, radius: Tensor, scale: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    def direction(x: Tensor, y: Tensor) -> Tensor:
        return cal_flash_loss(x, y, labels_of(x), scale).mean()

    return direction(text, audio) + direction(audio, text)


def memeff_infonce(audio: Tensor, text: Tensor, radius: Tensor, scale: Tensor) -> Tensor:
    """Its temperature is a number without a gradient; `stable` would rescale the gradient."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=0.07, normalized_inputs=True, stable=False)
    return 2.0 * loss(audio, text)


def siglip_kernel(
    audio: Tensor, text: Tensor, radius: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(audio, text, scale.log(), bias)


def optional(module: str, wanted: str, loss: peers.Loss) -> Callable[..., peers.Loss | None]:
    """A public kernel, where it is installed and computes the mode."""

    def build(objective: str, bilateral: str, plain: bool) -> peers.Loss | None:
        here = importlib.util.find_spec(module) is not None
        return loss if plain and objective == wanted and here else None

    return build


def linear_cross_entropy(objective: str, bilateral: str, plain: bool) -> peers.Loss | None:
    there = hasattr(torch.nn.functional, "linear_cross_entropy")  # from PyTorch 2.13 on
    return native_infonce if plain and objective == "infonce" and there else None


PEERS: dict[str, Callable[..., peers.Loss | None]] = {
    "eager": literal(False),
    "compile": literal(True),
    "panel": fused("panel"),
    "panel-32GiB": fused("panel", 32 * GIB),
    "triton-128MiB": fused("triton", 128 * 2**20),
    "cuda": fused("cuda"),
    "cuda-hopper": fused("cuda", hopper=True),
    "linear_cross_entropy": linear_cross_entropy,
    "inf_cl": optional("inf_cl", "infonce", inf_cl_infonce),
    "memeff": optional("memeff", "infonce", memeff_infonce),
    "siglip-kernel": optional("siglip_kernel", "siglip", siglip_kernel),
}
OURS = ("panel", "panel-32GiB", "triton-128MiB", "cuda", "cuda-hopper")
MODES = {
    "infonce": ("infonce", "none", True),
    "one-sided": ("infonce", "none", False),
    "mirror": ("infonce", "mirror", False),
    "siglip": ("siglip", "none", False),
    "siglip-plain": ("siglip", "none", True),
}


def matrix(part: str) -> Iterator[tuple[str, int, int, torch.dtype]]:
    """(mode, N, D, dtype), the most important first."""
    bf16 = torch.bfloat16
    if part == "large":
        for mode in MODES:  # siglip-plain last of them: not this project's own case
            yield mode, 65_536, 768, bf16
        for D in (512, 1024):
            yield "one-sided", 65_536, D, bf16
        for N in (16_384, 32_768):
            yield "one-sided", N, 768, bf16
        for dtype in (torch.float16, torch.float32):
            yield "one-sided", 16_384, 768, dtype
    else:
        for N in (24, 256, 1024, 4096):
            for mode in MODES:
                yield mode, N, 768, bf16
        for N in (256, 4096):
            for D in (512, 1024):
                yield "one-sided", N, D, bf16
            for dtype in (torch.float16, torch.float32):
                yield "one-sided", N, 768, dtype


def leaves_of(mode: str, N: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """Embeddings as trained encoders give them, and the scalars; built in slices on the device."""
    objective = MODES[mode][0]
    small = testing.make_inputs(
        testing.Case(N=min(N, 4096), D=D, dtype=dtype, options={"objective": objective})
    )
    repeat = (-(-N // len(small.audio)), 1)
    rows = []
    for seed, X in enumerate((small.audio, small.text)):
        generator = torch.Generator("cuda").manual_seed(seed)
        X = X.to("cuda", torch.float32).repeat(repeat)[:N]
        X = X + 0.1 * torch.randn(N, D, device="cuda", generator=generator) / D**0.5
        rows.append(torch.nn.functional.normalize(X, dim=1).to(dtype))
    scalars = [x for x in (small.radius, small.logit_scale, small.logit_bias) if x is not None]
    return [x.requires_grad_() for x in (*rows, *(x.cuda() for x in scalars))]


def gate(loss: peers.Loss, mode: str, D: int, dtype: torch.dtype, ours: bool) -> list[str]:
    """Violations of the acceptance rule at N = 1024."""
    objective, bilateral, plain = MODES[mode]
    case = testing.Case(
        N=1024, D=D, dtype=dtype, radius="none" if plain else "scalar",
        options={"objective": objective, "bilateral": bilateral},
    )  # fmt: skip
    inputs = testing.make_inputs(case, "cuda")

    def called(audio: Tensor, text: Tensor, *rest: Tensor | None, ids: None, weight: None,
               **_: Any) -> Tensor:  # fmt: skip
        radius = rest[0] if rest[0] is not None else torch.zeros((), device="cuda")
        return loss(audio, text, radius, *(x for x in rest[1:] if x is not None))

    exact = testing.truth(case, inputs)
    base = testing.baseline(case, inputs, rounded_weights=ours and dtype != torch.float32)
    floor = testing.floors(case, inputs, exact)
    return testing.violations(testing.evaluate(called, inputs, **case.options), exact, base, floor)


def timed(step: Callable[[], Any]) -> float:
    """Milliseconds between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(
    mode: str, N: int, D: int, dtype: torch.dtype, wanted: Sequence[str]
) -> list[dict[str, Any]]:
    """One interleaved run of the peers with these names."""
    objective, bilateral, plain = MODES[mode]
    leaves = leaves_of(mode, N, D, dtype)
    used = [leaves[0], leaves[1], *(leaves[3:] if plain else leaves[2:])]
    steps: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    rows: list[dict[str, Any]] = []
    for name in wanted:
        loss = PEERS[name](objective, bilateral, plain)
        if loss is None:
            continue
        row: dict[str, Any] = {"mode": mode, "N": N, "D": D, "dtype": str(dtype)[6:], "peer": name}
        rows.append(row)
        torch.compiler.reset()

        def forward(loss: peers.Loss = loss) -> Tensor:
            with torch.autocast("cuda", enabled=False):
                return loss(*leaves)

        def both(forward: Callable[[], Tensor] = forward) -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), used, allow_unused=True)

        row["gate"] = "not applied"
        try:
            if name in OURS:
                found = gate(loss, mode, D, dtype, True)
                row["gate"] = "; ".join(found) or "passed"
            for _ in range(WARM_UP):
                both()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            gradients = both()
            kept = sum(x.nbytes for x in gradients if x is not None)
            peak = torch.cuda.max_memory_allocated() - before - kept
            row["extra_mib"] = round(peak / 2**20, 1)
            steps[name] = (forward, both)
            del gradients
        except torch.OutOfMemoryError:
            row["gate"] += "; out of memory"
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            row["gate"] += f"; failed: {str(error)[:80]}"
        torch.cuda.empty_cache()
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for turn in range(ROUNDS):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            forward, both = steps[name]
            if turn > 2 and sum(samples[name][1]) > BUDGET_MS:
                continue
            samples[name][0].append(timed(forward))
            samples[name][1].append(timed(both))
    for row in rows:
        if row["peer"] in samples:
            for column, values in zip(("forward_ms", "both_ms"), samples[row["peer"]], strict=True):
                row[column] = round(statistics.median(values), 4)
            row["rounds"] = len(samples[row["peer"]][1])
    return rows


COLUMNS = ("mode", "N", "D", "dtype", "peer", "forward_ms", "both_ms", "extra_mib", "rounds",
           "gate")  # fmt: skip


def environment() -> dict[str, Any]:
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda,
        "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "supclap_kernels": sk.__version__, "commit": commit(),
    }  # fmt: skip


def add_arguments(
    parser: argparse.ArgumentParser, modes: Iterable[str], peers: Iterable[str]
) -> None:
    """What bench.latency and bench.kernels share."""
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", choices=tuple(modes), default=list(modes))
    parser.add_argument("--peers", nargs="+", choices=tuple(peers), default=list(peers))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after these")


def chosen(cases: Iterable[Any], given: argparse.Namespace) -> Iterator[Any]:
    """The cases of the modes asked for, until the time is over."""
    start = time.monotonic()
    for case in cases:
        if case[0] in given.modes and time.monotonic() - start < given.seconds:
            yield case


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("part", choices=("large", "small"))
    add_arguments(parser, MODES, PEERS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")
    with (given.out / f"{given.part}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for case in chosen(matrix(given.part), given):
            for row in measure(*case, given.peers):
                writer.writerow(row)
                print(row, flush=True)
            file.flush()  # a run that is cut off leaves what it has measured
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
