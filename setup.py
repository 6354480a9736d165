"""Builds `supclap_kernels._native` from `csrc/`; everything else is in pyproject.toml.

One ninja graph compiles every C++ and CUDA source in parallel and links the module, so a rebuild
compiles what changed and no more. torch is not needed: `csrc/` includes none of its headers.

    pip install -e .                        build and install
    python setup.py build_ext --inplace     rebuild after an edit in csrc/

Environment variables:
    SUPCLAP_CUDA        0: no CUDA; 1: CUDA required; unset: CUDA if nvcc is found
    SUPCLAP_CUDA_ARCHS  GPU targets; unset: the GPUs that are here (not for a wheel), or else
                        "80;90a;100;90+PTX" (a wheel: and 89)
    CXX                 C++ compiler
    CXXFLAGS, LDFLAGS   appended to the compiler's and the linker's flags
    MAX_JOBS            how many compilations run at once
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_tools.graph import NinjaGraph  # noqa: E402 - found through the line above
from build_tools.toolchain import (  # noqa: E402
    CPU_FLAGS,
    LOOP_FLAGS,
    BuildError,
    Compiler,
    Toolkit,
    cpu_variants,
    cuda_toolkit,
    gencode,
)

MODULE = "supclap_kernels._native"

# Compiled once for each instruction set, in a namespace named after it.
PER_ISA_SOURCE = Path("csrc/cpu/epilogue.cpp")
PER_ISA_NAMES = ["avx2", "avx512"]  # beyond the baseline
# Compiled for one instruction set only, and left out where the compiler does not know it.
SINGLE_ISA_SOURCES = {Path("csrc/cpu/bf16_gemm.cpp"): "avx512bf16"}

# For target 90a only.
HOPPER_SOURCE = Path("csrc/cuda/hopper/sweep.cu")

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Icsrc",
]
NVCC_FLAGS = [
    "-Icsrc",
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "--threads=2",
    "--resource-usage",  # registers, spills and shared memory of every kernel, kept in OBJECT.log
]


class NativeBuild(build_ext):
    """setuptools' build_ext with the compiling and linking given to ninja."""

    def build_extension(self, ext: Extension) -> None:
        # Not setuptools' build_temp: that is a new folder in every editable install.
        tag = f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = Path("build") / tag
        module = folder / Path(self.get_ext_filename(ext.name)).name
        try:
            stays = bool(self.inplace or self.editable_mode)
            native_graph(folder, module, stays).run()
        except BuildError as error:
            raise BaseError(str(error)) from None  # setuptools prints these without a traceback
        destination = Path(self.get_ext_fullpath(ext.name)).absolute()
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Rename, never overwrite: a running process may have the old module mapped.
        fresh = destination.with_suffix(".new")
        shutil.copy2(ROOT / module, fresh)
        fresh.replace(destination)


def native_graph(folder: Path, module: Path, stays: bool) -> NinjaGraph:
    """Every compile step of the native module, and its link. `stays`: it is for this machine."""
    import pybind11

    cxx = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    compiler = Compiler(shlex.split(cxx))
    compiler.check()
    toolkit = cuda_toolkit(os.environ)
    graph = NinjaGraph(
        folder,
        cxx=shlex.join(compiler.command),
        nvcc=shlex.quote(str(toolkit.nvcc)) if toolkit else "false",
        shared="-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared",
    )
    users = shlex.split(os.environ.get("CXXFLAGS", ""))
    have = add_cpu(graph, compiler, users)
    have += add_cuda(graph, toolkit, stays)

    python = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    for source in sources("csrc/*.cpp"):
        graph.compile("cxx", source, [*CXX_FLAGS, "-Os", *python, *have, *users])  # no loops there
    libraries = [str(toolkit.cudart), "-lrt"] if toolkit else []
    # Not exported, lest they meet another CUDA run time in the process: the symbols of cudart.
    platform = [] if sys.platform == "darwin" else ["-Wl,--exclude-libs,ALL", "-ldl"]
    users = shlex.split(os.environ.get("LDFLAGS", ""))
    graph.link(module, [*libraries, "-pthread", *platform, *users])
    return graph


def add_cpu(graph: NinjaGraph, compiler: Compiler, users: list[str]) -> list[str]:
    """Compiles `csrc/cpu`; returns the definitions that tell what was compiled."""
    variants = cpu_variants(compiler)
    base = [*CXX_FLAGS, *compiler.known(CPU_FLAGS)]
    loops = [*base, *compiler.known(LOOP_FLAGS)]
    built = ["baseline"]
    graph.compile("cxx", PER_ISA_SOURCE, [*loops, *isa_macro("baseline"), *users], "baseline")
    several = [(PER_ISA_SOURCE, isa) for isa in PER_ISA_NAMES]
    for source, isa in [*several, *SINGLE_ISA_SOURCES.items()]:
        if isa in variants:
            graph.compile("cxx", source, [*loops, *variants[isa], *isa_macro(isa), *users], isa)
            built.append(isa)
    have = [f"-DSUPCLAP_HAVE_{isa.upper()}=1" for isa in built]
    for source in sources("csrc/cpu/*.cpp"):
        if source != PER_ISA_SOURCE and source not in SINGLE_ISA_SOURCES:
            graph.compile("cxx", source, [*base, *have, *users])
    notice(f"CPU code for {', '.join(built)}")
    return have


def isa_macro(isa: str) -> list[str]:
    return [f"-DSUPCLAP_ISA={isa}"]


def add_cuda(graph: NinjaGraph, toolkit: Toolkit | None, stays: bool) -> list[str]:
    """Compiles `csrc/cuda`; returns the definitions that tell what was compiled."""
    if toolkit is None:
        why = "SUPCLAP_CUDA=0" if os.environ.get("SUPCLAP_CUDA") == "0" else "nvcc not found"
        notice(f"{why}: no CUDA C++ kernels")
        return []
    archs = toolkit.archs(os.environ, stays)
    names = ";".join(map(str, archs))
    version = f"{toolkit.version[0]}.{toolkit.version[1]}"
    notice(f"CUDA {version} in {toolkit.home}: kernels for {names}, a minute or two")
    smaller = ["--compress-mode=size"] if toolkit.version >= (12, 8) else []
    hopper = [arch for arch in archs if arch.name == "90a"]
    for source in sources("csrc/cuda/**/*.cu"):
        targets = hopper if source == HOPPER_SOURCE else archs
        if targets:
            graph.compile("cuda", source, [*NVCC_FLAGS, *smaller, *gencode(targets)])
    have = ["-DSUPCLAP_WITH_HOPPER=1"] if hopper else []
    return ["-DSUPCLAP_WITH_CUDA=1", f'-DSUPCLAP_CUDA_ARCHS="{names}"', *have]


def sources(pattern: str) -> list[Path]:
    """Files of the repository that match, relative to it, in a fixed order."""
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


def notice(text: str) -> None:
    print(f"supclap_kernels: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if sys.platform == "win32":
        raise BuildError("supclap_kernels builds on Linux and macOS; on Windows use WSL.")
    setup(ext_modules=[Extension(MODULE, ["csrc/module.cpp"])], cmdclass={"build_ext": NativeBuild})
