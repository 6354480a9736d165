"""Every Triton kernel as it is shipped, compiled without a GPU.

What is shipped is not a list that could grow old: the backends run once for every mode and dtype
with their launches recorded instead of made. A line of the report:

    registers, stack           per thread; stack in bytes
    spill_bytes                stack that holds spilled registers: 4 for each distinct slot stored
    loop_spills                local loads and stores inside the product loop
    shared_bytes               per block
    hmma, hgmma, utchmma       tensor core instructions (sm_80; sm_90; sm_100)
    ldl, stl                   local loads and stores, all of them
    compile_seconds            of this kernel alone
"""

import concurrent.futures
import importlib
import inspect
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import tool

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
"""Bytes of a block, by architecture."""
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """One kernel with all that Triton specialises on."""

    module: str
    name: str
    label: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


def describe(kernel: Any, label: str, arguments: tuple[Any, ...], given: dict[str, Any]) -> Launch:
    """What Triton's launcher would make of these arguments, all tensors being aligned."""
    options = tuple((name, given[name]) for name in OPTIONS if name in given)
    named = {name: value for name, value in given.items() if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*arguments, **named).arguments
    signature, constants, aligned = [], [], []
    for n, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        fixed = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or fixed:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((parameter.name, TYPES[value.dtype]))
            if not parameter.do_not_specialize_on_alignment:
                aligned.append(n)
        else:
            signature.append((parameter.name, "fp32" if isinstance(value, float) else "i32"))
            whole = isinstance(value, int) and value % 16 == 0
            if whole and not parameter.do_not_specialize:
                aligned.append(n)
    return Launch(
        kernel.fn.__module__, kernel.fn.__name__, label,
        tuple(signature), tuple(constants), tuple(aligned), options,
    )  # fmt: skip


def calls() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(label, make_inputs' fields, options) that reach every kernel in every mode."""
    modes = [{"radius": "none"}, {"bilateral": "none"}, {"bilateral": "shared"}, {}]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for objective in ("infonce", "siglip"):
            for mode in modes:
                if objective == "siglip" and mode.get("bilateral") == "shared":
                    continue
                options = {"objective": objective, **mode}
                fields = {"dtype": dtype, "radius": options.pop("radius", "scalar")}
                name = "plain" if mode == modes[0] else options.get("bilateral", "mirror")
                yield f"{str(dtype)[6:]} {objective} {name}", fields, options
        full = {"reduction": "none", "normalize": True, "renormalize": True, "stats": True}
        fields = {"dtype": dtype, "radius": "row", "weighted": True, "duplicates": True, "D": 100}
        yield f"{str(dtype)[6:]} infonce mirror, every option", fields, full


def launches(arch: int, only: str = "", N: int = 200) -> list[Launch]:
    """Every kernel of every call (whose label contains `only`), once."""
    import triton

    from supclap_kernels.backends.call import Tensors
    from supclap_kernels.backends.triton import call as triton_call
    from supclap_kernels.options import Options
    from supclap_kernels.testing import Case, make_inputs

    found: dict[tuple[Any, ...], Launch] = {}
    label = ""

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **given: Any) -> None:
        launch = describe(kernel, label, arguments, given)
        found.setdefault((launch[:2], *launch[3:]), launch)

    triton_call.architecture = lambda device: arch
    triton.JITFunction.run = record
    needs = (True,) * 5
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        for label, fields, chosen in calls():
            if precision == "tf32":
                if fields["dtype"] != torch.float32:
                    continue
                label = label.replace("float32", "tf32")
            if only not in label:
                continue
            case = Case(**{"N": N, "D": 128, **fields}, options=chosen)
            given = vars(make_inputs(case))
            *tensors, upstream = list(given.values())[: len(Tensors._fields) + 1]
            inputs = Tensors(*tensors)
            options = Options(**chosen, workspace=0)  # several tiles
            for backend in (triton_call.PANEL, triton_call.TILE):
                _, _, state, saved = backend.forward(inputs, options, needs)
                backend.backward(inputs, options, needs, upstream, state, saved)
    return list(found.values())


def product_loops(sass: list[tool.Instruction], ieee: bool) -> list[tuple[int, int]]:
    """Address ranges of the innermost loops that multiply matrices."""
    product = re.compile(r"FFMA" if ieee else r"(UTC)?[HQ]G?MMA")
    loops = []
    for end, name, operands in sass:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and int(target[1], 16) < end:
            start = int(target[1], 16)
            products = sum(bool(product.match(x.name)) for x in sass if start <= x.address <= end)
            if products >= (256 if ieee else 1):
                loops.append((start, end))
    return [
        (start, end) for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]  # fmt: skip


def stored_bytes(sass: list[tool.Instruction]) -> int:
    """Of the local memory that is stored to."""
    slots: dict[str, int] = {}
    for _, name, operands in sass:
        if name.startswith("STL"):
            slot, size = operands.split(",")[0], {"64": 8, "128": 16}.get(name.split(".")[-1], 4)
            slots[slot] = max(size, slots.get(slot, 0))
    return sum(slots.values())


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """The report's line."""
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch.module), launch.name)
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(n,): [["tt.divisibility", 16]] for n in launch.aligned},
    )
    start = sum(os.times()[:4])
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options)
    )
    seconds = sum(os.times()[:4]) - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool.cuobjdump("--dump-resource-usage", file.name)
        (sass,) = tool.functions(Path(file.name)).values()
    ieee = ("PRECISION", "ieee") in launch.constants and "*fp32" == dict(launch.signature).get("T")
    loops = product_loops(sass, ieee or launch.name.startswith("literal"))
    local = [x.address for x in sass if x.name.startswith(("LDL", "STL"))]
    registers, stack = (int(re.findall(rf"{x}:(\d+)", usage)[0]) for x in ("REG", "STACK"))
    shown = [f"{name}={value}" for name, value in launch.constants if isinstance(value, int | str)]
    return {
        "name": launch.name,
        "config": " ".join([launch.label, *shown, *(f"{n}={v}" for n, v in launch.options)]),
        "registers": registers,
        "stack": stack,
        "spill_bytes": min(stored_bytes(sass), stack),
        "loop_spills": sum(s <= address <= e for address in local for s, e in loops),
        "shared_bytes": compiled.metadata.shared,
        **tool.count(sass, "HMMA", "HGMMA", "UTCHMMA", "LDL", "STL"),
        "compile_seconds": round(seconds, 2),
    }


def report(arch: int, kernel: str = "", jobs: int = 2, only: str = "") -> Iterator[dict[str, Any]]:
    """Lines for every shipped configuration, as they are done."""
    chosen = [launch for launch in launches(arch, only) if kernel in launch.name]
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(compile_launch, chosen, [arch] * len(chosen))
