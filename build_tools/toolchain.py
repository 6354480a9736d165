"""What can this machine's compilers do?  Questions `setup.py` asks before it builds.

Standard library only, and nothing here builds anything, so the tests call these functions directly.

    Compiler(["c++"]).accepts(["-mavx2"])     trial compile of one translation unit
    cpu_variants(compiler)                    which instruction sets `csrc/cpu` is compiled for
    cuda_toolkit(env)                         the CUDA toolkit to use, or None
    parse_archs("80;90a;90+PTX")              the GPU targets asked for
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Tried in this order after CUDA_HOME, CUDA_PATH and PATH.
DEFAULT_CUDA_HOMES = (Path("/usr/local/cuda"),)

# Ampere (8.x) and Hopper with its own instructions (9.0a) run machine code made here, and so does
# data-centre Blackwell (10.x). Every later GPU compiles the 9.0 PTX on first use: PTX of 9.0a would
# not run on anything but 9.0.
DEFAULT_CUDA_ARCHS = "80;90a;100;90+PTX"
# Of a wheel, which goes to other machines: Ada (8.9) has machine code of its own.
WHEEL_CUDA_ARCHS = "80;89;90a;100;90+PTX"

# The first toolkit that knows sm_90a.
OLDEST_CUDA = (12, 0)


class BuildError(RuntimeError):
    """The build can't go on; the message says what is required, what was found and what to do."""


# ---------------------------------------------------------------------------------- C++ compiler


# Flags of one instruction set. Every variant runs only on a machine that has all of its sets: the
# run-time dispatch checks that before it enters one.
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mprefer-vector-width=512",
    ],
    "avx512bf16": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"],
}

# Of all CPU code: honour `#pragma omp simd`. No OpenMP runtime is linked.
CPU_FLAGS = ["-fopenmp-simd"]

# Of loops over elements: let the compiler vectorise calls and selects that would otherwise have to
# set errno or to keep the order of floating-point exceptions, and fuse a multiply with an add. None
# of these permits reassociation or assumes the absence of NaN.
LOOP_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


@dataclass
class Compiler:
    """A C++ compiler command, e.g. `["c++"]` or `["ccache", "clang++"]`."""

    command: list[str]

    def accepts(self, flags: list[str], source: str = "int main() { return 0; }") -> bool:
        """Whether `source` compiles with `flags`; unknown flags are errors, for clang too."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "trial.cpp")
            file.write_text(source)
            trial = [*self.command, *flags, "-Werror", "-c", str(file), "-o", f"{folder}/trial.o"]
            return subprocess.run(trial, capture_output=True).returncode == 0

    def known(self, flags: list[str]) -> list[str]:
        """Those of `flags` that the compiler knows."""
        return [flag for flag in flags if self.accepts([flag])]

    def check(self) -> None:
        """Raises BuildError unless the compiler runs and knows C++17."""
        program = self.command[0]
        if shutil.which(program) is None:
            raise BuildError(
                f"supclap_kernels needs a C++17 compiler; {program!r} is not on PATH. "
                "Install g++ or clang++, or name one in the environment variable CXX."
            )
        if not self.accepts(["-std=c++17"]):
            raise BuildError(
                f"supclap_kernels needs a C++17 compiler; {' '.join(self.command)!r} does not "
                "compile an empty program with -std=c++17."
            )


def cpu_variants(compiler: Compiler) -> dict[str, list[str]]:
    """Instruction sets beyond the portable baseline that can be compiled, each with its flags.

    Asks the compiler, not this machine's processor: the wheel runs elsewhere. Empty unless the
    target is x86-64.
    """
    x86_64 = "#if !defined(__x86_64__)\n#error not x86-64\n#endif\n"
    if not compiler.accepts([], x86_64):
        return {}
    return {name: flags for name, flags in INSTRUCTION_SETS.items() if compiler.accepts(flags)}


# -------------------------------------------------------------------------------------- GPU targets


@dataclass(frozen=True)
class Arch:
    """One GPU target: compute capability 9.0 with feature suffix "a" is number 90, suffix "a"."""

    number: int
    suffix: str = ""  # "a": this very chip only; "f": its family
    ptx: bool = False  # PTX too, which later GPUs compile on first use

    @property
    def name(self) -> str:
        return f"{self.number}{self.suffix}"

    def __str__(self) -> str:
        return self.name + ("+PTX" if self.ptx else "")


def parse_archs(text: str) -> list[Arch]:
    """Targets in SUPCLAP_CUDA_ARCHS, e.g. "80;90a;90+PTX"; "8.0, 9.0a" means the same as "80;90a".

    Raises BuildError that names the first malformed entry.
    """
    archs: list[Arch] = []
    for entry in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(\d{1,2})\.?(\d)([af]?)(\+PTX)?", entry, re.IGNORECASE)
        if match is None:
            raise BuildError(
                f"SUPCLAP_CUDA_ARCHS={text!r}: {entry!r} is not a GPU target. Required are compute "
                f"capabilities divided by semicolons, each NUMBER[a|f] or NUMBER+PTX, such as "
                f"{DEFAULT_CUDA_ARCHS!r}."
            )
        arch = Arch(int(match[1] + match[2]), match[3].lower(), match[4] is not None)
        if arch.ptx and arch.suffix:
            raise BuildError(
                f"SUPCLAP_CUDA_ARCHS={text!r}: PTX of {arch.name} does not run on later GPUs; "
                f"write '{arch.name};{arch.number}+PTX'."
            )
        if arch not in archs:
            archs.append(arch)
    if not archs:
        raise BuildError(
            f"SUPCLAP_CUDA_ARCHS={text!r} names no GPU target. Leave it unset for "
            f"{DEFAULT_CUDA_ARCHS!r}, or set SUPCLAP_CUDA=0 to build without CUDA."
        )
    return archs


def gpus_here(env: Mapping[str, str]) -> list[Arch]:
    """The targets of this machine's GPUs, as nvidia-smi names them; empty if nothing answers, or
    if one of them is older than the kernels."""
    program = shutil.which("nvidia-smi", path=env.get("PATH", ""))
    if program is None:
        return []
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    numbers = {line.strip().replace(".", "") for line in answer.stdout.splitlines()}
    known = answer.returncode == 0 and all(re.fullmatch(r"\d{2,3}", n) for n in numbers)
    if not known or not numbers or int(min(numbers, key=int)) < 80:
        return []
    return [Arch(int(n), "a" if n == "90" else "") for n in sorted(numbers, key=int)]


def gencode(archs: list[Arch]) -> list[str]:
    """nvcc's flags for `archs`: machine code for each, and PTX where asked for.

    `90+PTX` beside `90a` adds the PTX only: two sets of machine code for one chip are of no use.
    """
    special = {arch.number for arch in archs if arch.suffix == "a"}
    flags = []
    for arch in archs:
        if arch.suffix or arch.number not in special:
            flags.append(f"-gencode=arch=compute_{arch.name},code=sm_{arch.name}")
        if arch.ptx:
            flags.append(f"-gencode=arch=compute_{arch.name},code=compute_{arch.name}")
    return flags


# ------------------------------------------------------------------------------------- CUDA toolkit


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that answered."""

    nvcc: Path
    home: Path
    version: tuple[int, int]
    numbers: frozenset[int]  # compute capabilities it compiles for
    cudart: Path  # libcudart_static.a

    def archs(self, env: Mapping[str, str], stays: bool = True) -> list[Arch]:
        """The targets asked for in `env`; else, for a module that stays on this machine, its GPUs;
        else those defaults that this toolkit knows."""
        text = env.get("SUPCLAP_CUDA_ARCHS")
        if text is None:
            here = gpus_here(env) if stays else []
            if here and all(arch.number in self.numbers for arch in here):
                return here
            default = DEFAULT_CUDA_ARCHS if stays else WHEEL_CUDA_ARCHS
            return [a for a in parse_archs(default) if a.number in self.numbers]
        archs = parse_archs(text)
        for arch in archs:
            if arch.number not in self.numbers:
                raise BuildError(
                    f"SUPCLAP_CUDA_ARCHS={text!r}: CUDA {self.version[0]}.{self.version[1]} "
                    f"({self.nvcc}) does not compile for {arch.name}; it knows "
                    f"{', '.join(map(str, sorted(self.numbers)))}."
                )
        return archs


def find_nvcc(env: Mapping[str, str]) -> Path | None:
    """nvcc under CUDA_HOME or CUDA_PATH, then on PATH, then in the usual place."""
    homes = [Path(env[key]) for key in ("CUDA_HOME", "CUDA_PATH") if env.get(key)]
    on_path = shutil.which("nvcc", path=env.get("PATH", ""))
    candidates = [home / "bin" / "nvcc" for home in homes]
    candidates += [Path(on_path)] if on_path else []
    candidates += [home / "bin" / "nvcc" for home in DEFAULT_CUDA_HOMES]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def cuda_toolkit(env: Mapping[str, str]) -> Toolkit | None:
    """The toolkit to build with; None means a build for the CPU only.

    SUPCLAP_CUDA=0 asks for none, SUPCLAP_CUDA=1 requires one, unset takes one if it is there. A
    toolkit that is there and does not work is an error in the last two cases: a library that has
    silently lost its CUDA kernels is worse than a build that stops.
    """
    choice = env.get("SUPCLAP_CUDA", "")
    if choice not in ("", "0", "1"):
        raise BuildError(
            f"SUPCLAP_CUDA={choice!r}: must be 0 (no CUDA), 1 (CUDA required) or unset."
        )
    if choice == "0":
        return None
    nvcc = find_nvcc(env)
    if nvcc is not None:
        return probe(nvcc)
    if choice == "1":
        raise BuildError(
            "SUPCLAP_CUDA=1 requires nvcc, which is neither under CUDA_HOME or CUDA_PATH, nor on "
            f"PATH, nor in {', '.join(map(str, DEFAULT_CUDA_HOMES))}. Install a CUDA toolkit "
            f"(>= {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}) or unset SUPCLAP_CUDA."
        )
    return None


def probe(nvcc: Path) -> Toolkit:
    """Asks nvcc what and where it is.

    `nvcc` may be a wrapper script outside the toolkit, so its own path says nothing: a dry run
    prints the root as `TOP=` and the library folders as `LIBRARIES=`.
    """
    release = re.search(r"release (\d+)\.(\d+)", _ask(nvcc, "--version"))
    dry_run = _ask(nvcc, "--dryrun", "-x", "cu", "/dev/null", "-c", "-o", "/dev/null")
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    if release is None or top is None:
        raise BuildError(
            f"{nvcc} does not answer as nvcc does (no 'release' in --version or no 'TOP=' in "
            "--dryrun). Set CUDA_HOME to a CUDA toolkit, or SUPCLAP_CUDA=0 to build without CUDA."
        )
    version = int(release[1]), int(release[2])
    if version < OLDEST_CUDA:
        raise BuildError(
            f"supclap_kernels needs CUDA >= {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}; {nvcc} is "
            f"{version[0]}.{version[1]}. Set CUDA_HOME to a newer toolkit, or SUPCLAP_CUDA=0 to "
            "build without CUDA."
        )
    home = Path(top[1].strip()).resolve()
    numbers = frozenset(map(int, re.findall(r"compute_(\d+)\b", _ask(nvcc, "--list-gpu-arch"))))
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", dry_run, re.MULTILINE)
    folders = re.findall(r'-L([^"\s]+)', libraries[1]) if libraries else []
    return Toolkit(nvcc, home, version, numbers, _static_runtime(home, folders))


def _static_runtime(home: Path, folders: list[str]) -> Path:
    """libcudart_static.a in one of nvcc's own library folders or in a usual one under `home`."""
    machine = platform.machine()
    targets = ["sbsa-linux", "aarch64-linux"] if machine == "aarch64" else [f"{machine}-linux"]
    places = [Path(folder) for folder in folders]
    places += [home / "lib64", home / "lib", *(home / "targets" / name / "lib" for name in targets)]
    for place in places:
        if (place / "libcudart_static.a").is_file():
            return (place / "libcudart_static.a").resolve()
    raise BuildError(
        f"the CUDA toolkit in {home} has no libcudart_static.a (looked in "
        f"{', '.join(map(str, places))}). Install the CUDA runtime's development files, or set "
        "SUPCLAP_CUDA=0 to build without CUDA."
    )


def _ask(nvcc: Path, *arguments: str) -> str:
    """All that `nvcc ARGUMENTS` prints; BuildError with the same text if it fails."""
    try:
        answer = subprocess.run(
            [str(nvcc), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        status, output = answer.returncode, answer.stdout
    except OSError as error:
        status, output = -1, str(error)
    if status != 0:
        raise BuildError(
            f"`{nvcc} {' '.join(arguments)}` failed with status {status}:\n{output.strip()}\n"
            "Repair the CUDA toolkit, or set SUPCLAP_CUDA=0 to build without CUDA."
        )
    return output
