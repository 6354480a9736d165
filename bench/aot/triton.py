"""Compile every Triton kernel as it is shipped, without a GPU, and report what came out.

    python -m bench.aot --arch sm_80|sm_90|sm_100 [--kernel NAME] [--jobs N]
    python -m bench.aot --backend cuda --arch sm_80|sm_90a|sm_100       (aot_cuda.py)
    python -m bench.aot --backend hopper

prints one JSON object per line. What is shipped is not a list that could grow old: the backends run
once for every mode and dtype with their launches recorded instead of made.

    registers, stack           per thread; stack in bytes
    spill_bytes                stack that holds spilled registers: 4 for each distinct slot stored
    loop_spills                local loads and stores inside the product loop
    shared_bytes               per block
    hmma, hgmma, utchmma       tensor core instructions (sm_80; sm_90; sm_100)
    ldl, stl                   local loads and stores, all of them
    compile_seconds            of this kernel alone
"""

import argparse
import collections
import concurrent.futures
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
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

    from supclap_kernels.backends import gpu_triton
    from supclap_kernels.backends.contract import Inputs
    from supclap_kernels.options import Options
    from supclap_kernels.testing import Case, make_inputs

    found: dict[tuple[Any, ...], Launch] = {}
    label = ""

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **given: Any) -> None:
        launch = describe(kernel, label, arguments, given)
        found.setdefault((launch[:2], *launch[3:]), launch)

    gpu_triton.architecture = lambda device: arch
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
            given = make_inputs(case)
            inputs = Inputs(
                given.audio, given.text, given.radius, given.logit_scale, given.logit_bias,
                given.ids, given.weight,
            )  # fmt: skip
            options = Options(**chosen, workspace=0)  # several tiles
            for backend in (gpu_triton.PANEL, gpu_triton.TRITON):
                _, _, state, saved = backend.forward(inputs, options, needs)
                backend.backward(inputs, options, needs, given.upstream, state, saved)
    return list(found.values())


def run_tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def product_loops(sass: list[tuple[int, str, str]], ieee: bool) -> list[tuple[int, int]]:
    """Address ranges of the innermost loops that multiply matrices."""
    product = re.compile(r"FFMA" if ieee else r"(UTC)?[HQ]G?MMA")
    loops = []
    for address, op, text in sass:
        target = re.search(r"0x([0-9a-f]+)", text)
        if op.startswith("BRA") and target and int(target[1], 16) < address:
            start = int(target[1], 16)
            count = sum(bool(product.match(o)) for a, o, _ in sass if start <= a <= address)
            if count >= (256 if ieee else 1):
                loops.append((start, address))
    return [
        (start, end) for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]  # fmt: skip


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
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        text = run_tool("cuobjdump", "-sass", file.name)
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);"
    sass = [(int(a, 16), op, rest) for a, op, rest in re.findall(line, text, re.M)]
    count = collections.Counter(op.split(".")[0] for _, op, _ in sass)
    ieee = ("PRECISION", "ieee") in launch.constants and "*fp32" == dict(launch.signature).get("T")
    loops = product_loops(sass, ieee or launch.name.startswith("far"))
    local = [(address, op) for address, op, _ in sass if op.startswith(("LDL", "STL"))]
    slots = {rest.split(",")[0] for _, op, rest in sass if op.startswith("STL")}
    wide = {"64": 8, "128": 16}
    stored = sum(
        max(wide.get(op.split(".")[-1], 4) for _, op, r in sass
            if op.startswith("STL") and r.split(",")[0] == slot)
        for slot in slots
    )  # fmt: skip

    def resource(name: str) -> int:
        return int(re.findall(rf"{name}:(\d+)", usage)[0])

    shown = [f"{name}={value}" for name, value in launch.constants if isinstance(value, int | str)]
    return {
        "name": launch.name,
        "config": " ".join([launch.label, *shown, *(f"{n}={v}" for n, v in launch.options)]),
        "registers": resource("REG"),
        "stack": resource("STACK"),
        "spill_bytes": min(stored, resource("STACK")) if stored else 0,
        "loop_spills": sum(s <= address <= e for address, _ in local for s, e in loops),
        "shared_bytes": compiled.metadata.shared,
        "hmma": count["HMMA"],
        "hgmma": count["HGMMA"],
        "utchmma": count["UTCHMMA"],
        "ldl": count["LDL"],
        "stl": count["STL"],
        "compile_seconds": round(seconds, 2),
    }


def report(arch: int, kernel: str = "", jobs: int = 2, only: str = "") -> Iterator[dict[str, Any]]:
    """Lines for every shipped configuration, as they are done."""
    chosen = [launch for launch in launches(arch, only) if kernel in launch.name]
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(compile_launch, chosen, [arch] * len(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("triton", "cuda", "hopper"), default="triton")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--only", default="", help="part of a label, such as bfloat16 or siglip")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing is compiled in the interpreter")
    if given.backend != "triton":
        from . import aot_cuda

        hopper = given.backend == "hopper"
        found = aot_cuda.report_hopper() if hopper else aot_cuda.report(given.arch)
        lines = (line for line in found if given.kernel in line["name"])
    elif given.arch in ARCHITECTURES:
        lines = report(ARCHITECTURES[given.arch], given.kernel, given.jobs, given.only)
    else:
        parser.error(f"--arch must be one of {', '.join(ARCHITECTURES)}, got {given.arch}")
    for line in lines:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
