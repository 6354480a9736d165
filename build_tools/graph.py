"""A build.ninja: every object with its flags, and the library that they are linked to."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

from .toolchain import BuildError

ROOT = Path(__file__).resolve().parents[1]

NINJA_RULES = """\
rule cxx
  command = $cxx $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in $isa

rule cuda
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1 $
    && { grep -A3 warning $out.log || true; } || { cat $out.log; exit 1; }
  depfile = $out.d
  deps = gcc
  description = nvcc $in

rule link
  command = $cxx $shared $in -o $out $flags
  description = link $out
"""


class NinjaGraph:
    """The text of one build.ninja; paths are relative to the repository."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.objects: list[Path] = []
        self.lines = [f"builddir = {self._path(folder)}"]
        self.lines += [f"{name} = {value.replace('$', '$$')}" for name, value in variables.items()]
        self.lines += ["", NINJA_RULES]

    def compile(self, rule: str, source: Path, flags: list[str], isa: str = "") -> None:
        """One object of `source`; `isa` divides the objects of one source."""
        target = self.folder / source.with_suffix(f".{isa}.o" if isa else ".o")
        self._edge(rule, [source], target, flags)
        if isa:
            self.lines.append(f"  isa = {isa}")
        self.objects.append(target)

    def link(self, target: Path, flags: list[str]) -> None:
        self._edge("link", self.objects, target, flags)
        self.lines.append(f"default {self._path(target)}")

    def run(self) -> None:
        """Runs ninja; BuildError with the end of its output if a command fails."""
        file = self.folder / "build.ninja"
        (ROOT / file).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / file).write_text("\n".join(self.lines) + "\n")
        run_ninja(["-f", str(file)])

    def _edge(self, rule: str, sources: list[Path], target: Path, flags: list[str]) -> None:
        inputs = " ".join(map(self._path, sources))
        self.lines.append(f"build {self._path(target)}: {rule} {inputs}")
        self.lines.append(f"  flags = {shlex.join(flags).replace('$', '$$')}")

    @staticmethod
    def _path(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run_ninja(arguments: list[str]) -> None:
    """Runs ninja in the repository and passes its output on line by line."""
    command = find_ninja() + arguments
    if os.environ.get("MAX_JOBS"):
        command.append(f"-j{os.environ['MAX_JOBS']}")
    tail: deque[str] = deque(maxlen=60)
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            tail.append(line)
    if process.returncode != 0:
        raise BuildError(f"compiling supclap_kernels._native failed:\n{''.join(tail)}")


def find_ninja() -> list[str]:
    """The `ninja` package of this environment, else the program on PATH."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    if shutil.which("ninja"):
        return ["ninja"]
    raise BuildError("supclap_kernels is built with ninja, which is missing: `pip install ninja`.")
