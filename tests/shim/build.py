"""Builds the Python module `supclap_shim`: csrc/cuda compiled for the host.

path = build(sanitize="")  # or "thread", "address"
"""

import hashlib
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).resolve().parent
FLAGS = "-std=c++17 -g -fPIC -Wall -Wextra -Wno-unknown-pragmas -Icsrc -Itests/shim"
SANITIZE = {
    "": "-O2",
    "thread": "-O1 -fsanitize=thread",
    "address": "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all",
}
UNSEEN = {**SANITIZE, "thread": "-O2 -DSHIM_TELLS_TSAN=1"}
DEFINE = ["-DSUPCLAP_WITH_CUDA=1", "-DSUPCLAP_WITH_HOPPER=1", '-DSUPCLAP_CUDA_ARCHS="host"']


def sources() -> list[Path]:
    return [
        *sorted(ROOT.glob("csrc/cuda/**/*.cu")),
        ROOT / "csrc/cuda_module.cpp",
        ROOT / "csrc/cuda_direct.cpp",
        ROOT / "csrc/direct.cpp",
        SHIM / "async.cpp",
        SHIM / "shim.cpp",
        SHIM / "module.cpp",
    ]


def build(sanitize: str = "") -> Path:
    """The module's path; compiles what is not there yet for these sources."""
    files = [*ROOT.glob("csrc/**/*"), *SHIM.glob("*")]
    content = b"".join(path.read_bytes() for path in sorted(files) if path.is_file())
    key = hashlib.sha256(content + sanitize.encode()).hexdigest()[:16]
    folder = ROOT / "build" / "shim" / key
    module = folder / "supclap_shim.so"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = [*FLAGS.split(), *DEFINE, *include]
    objects, running = [], []
    for source in sources():
        target = folder / f"{source.stem}.o"
        own = UNSEEN if source.parent == SHIM else SANITIZE
        command = ["g++", *flags, *own[sanitize].split(), "-x", "c++", "-c", str(source)]
        command += ["-o", str(target)]
        objects.append(str(target))
        running.append((command, subprocess.Popen(command, cwd=ROOT)))
        if len(running) == 2:
            wait(*running.pop(0))
    for command, process in running:
        wait(command, process)
    fresh = module.with_suffix(".new")
    link = ["g++", "-shared", *SANITIZE[sanitize].split(), *objects, "-o", str(fresh)]
    wait(link, subprocess.Popen(link, cwd=ROOT))
    fresh.replace(module)
    return module


def wait(command: list[str], process: "subprocess.Popen[bytes]") -> None:
    if process.wait() != 0:
        raise RuntimeError(f"failed: {shlex.join(command)}")


if __name__ == "__main__":
    print(build())
