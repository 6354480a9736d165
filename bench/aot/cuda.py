"""What nvcc made of the CUDA kernels: in this checkout's build, or (Hopper) compiled for it.

A line of the report holds one kernel's registers, stack, spills and static shared memory from the
build's log, its dynamic shared memory (the most it asks for), and from the machine code how many
instructions multiply on the tensor cores (HMMA, HGMMA) or copy by a tensor map (UTMALDG).
"""

import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supclap_kernels import native

from ..machine import ROOT
from . import tool

CHIP = (132, 227 * 1024)
"""Multiprocessors and shared memory of a block on an H200."""
DTYPES = {"IfL": 0, "Bfloat16": 1, "Float16": 2}


def logs() -> list[Path]:
    """Of the build for this Python."""
    found = sorted(ROOT.glob(f"build/native-*{sys.implementation.cache_tag}/csrc/cuda/*/*.o.log"))
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
    if "hopper_kernel" in name or "hopper_plain_kernel" in name:
        return int(module.HOPPER_SHARED)
    if "single_kernel" not in name:
        return 4 * (2 * 2048 + int(module.THREADS)) * ("literal_" in name and "list" not in name)
    p = module.CudaProblem()
    p.width, p.infonce, p.mode = 2048, True, 3
    p.dtype = next(number for word, number in DTYPES.items() if word in name)
    side = int(re.findall(r"Li(\d+)E", name)[0])
    p.N = module.single_limit(p, side, *CHIP)
    return int(module.plan_single(p, True, side, *CHIP).shared)


def kernels(log: str, source: str, arch: str, binary: Path) -> Iterator[dict[str, Any]]:
    """A line for every kernel in the log of one compilation."""
    sass = tool.functions(binary, "-arch", arch)
    # A kernel, then the functions it calls.
    for entry in log.split("Compiling entry function ")[1:]:
        name, target = re.findall(r"'(\w+)'", entry)[:2]
        if target != arch:
            continue
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", entry)]
        yield {
            "name": name,
            "source": source,
            "registers": number(r"Used (\d+) registers", entry),
            "stack": number(r"(\d+) bytes cumulative stack size", entry),
            "spill_bytes": max(spills),
            "static_shared": number(r"(\d+) bytes smem", entry),
            "dynamic_shared": dynamic_shared(name),
            **tool.count(sass[name], "HMMA", "HGMMA", "UTMALDG"),
        }


def report(arch: str) -> Iterator[dict[str, Any]]:
    module = Path(str(native.module().__file__))
    for log in logs():
        yield from kernels(log.read_text(), log.name.removesuffix(".o.log"), arch, module)


def report_hopper() -> Iterator[dict[str, Any]]:
    setup = runpy.run_path(str(ROOT / "setup.py"))
    toolkit, source = setup["cuda_toolkit"](os.environ), ROOT / setup["HOPPER_SOURCE"]
    if toolkit is None:
        raise FileNotFoundError("no nvcc")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "sweep.o")
        command = [toolkit.nvcc, *setup["NVCC_FLAGS"], "-gencode=arch=compute_90a,code=sm_90a"]
        command += ["-c", source, "-o", binary]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        log = done.stdout + done.stderr
        serialized = set(re.findall(r"instructions are serialized .* in the function '(\w+)'", log))
        for line in kernels(log, source.name, "sm_90a", binary):
            yield {**line, "serialized": line["name"] in serialized}
