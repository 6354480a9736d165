"""What nvcc made of the CUDA kernels in this checkout's build.

    python -m bench.aot --backend cuda --arch sm_80|sm_90a|sm_100

prints one JSON object per kernel: registers, stack, spills and static shared memory from the
build's log, dynamic shared memory (the most it asks for), tensor core instructions from the module.
"""

import collections
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supclap_kernels import native

from .aot import run_tool

ROOT = Path(__file__).parent.parent
CHIP = (132, 227 * 1024)
"""Multiprocessors and shared memory of a block on an H200."""
DTYPES = {"IfL": 0, "Bfloat16": 1, "Float16": 2}


def logs() -> list[Path]:
    """Of the build for this Python."""
    found = sorted(ROOT.glob(f"build/native-*{sys.implementation.cache_tag}/csrc/cuda/*.o.log"))
    if not found:
        raise FileNotFoundError("no build log: run `python setup.py build_ext --inplace`")
    return found


def number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[0]) if found else 0


def dynamic_shared(name: str) -> int:
    """Bytes a block asks for at most, on an H200 and at D = 2048."""
    module = native.cuda()
    if "panel_tile" in name:
        return int(module.PANEL_SHARED)
    if "single_kernel" not in name:
        return 4 * (2 * 2048 + int(module.THREADS)) * ("far_" in name and "list" not in name)
    p = module.Problem()
    p.width, p.infonce, p.mode = 2048, True, 3
    p.dtype = next(number for word, number in DTYPES.items() if word in name)
    side = int(re.findall(r"Li(\d+)E", name)[0])
    p.N = module.single_limit(p, side, *CHIP)
    return int(module.plan_single(p, True, side, *CHIP).shared)


def tensor_instructions(arch: str) -> dict[str, int]:
    """HMMA of every kernel of the module, by mangled name."""
    module = str(native.module().__file__)
    found: dict[str, int] = collections.Counter()
    name = ""
    for line in run_tool("cuobjdump", "-sass", "-arch", arch, module).splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            name = match[1]
        found[name] += " HMMA." in line
    return found


def report(arch: str, kernel: str = "") -> Iterator[dict[str, Any]]:
    """A line for every kernel whose name contains `kernel`."""
    tensor = tensor_instructions(arch)
    for log in logs():
        # A kernel, then the functions it calls.
        for entry in log.read_text().split("Compiling entry function ")[1:]:
            name, target = re.findall(r"'(\w+)'", entry)[:2]
            if target != arch or kernel not in name:
                continue
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", entry)]
            yield {
                "name": name,
                "source": log.name.removesuffix(".o.log"),
                "registers": number(r"Used (\d+) registers", entry),
                "stack": number(r"(\d+) bytes cumulative stack size", entry),
                "spill_bytes": max(spills),
                "static_shared": number(r"(\d+) bytes smem", entry),
                "dynamic_shared": dynamic_shared(name),
                "hmma": tensor[name],
            }
