"""What is released: an sdist that builds, and a wheel that needs no compiler where it is used."""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from covering import in_all

from supclap_kernels import native

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    in_all,
    pytest.mark.skipif(sys.platform != "linux", reason="names Linux wheels"),
    pytest.mark.skipif(shutil.which("git") is None, reason="copies what git knows"),
]
CORE = ("tests/loss/test_values.py", "tests/loss/test_direct.py", "tests/backends/test_cpu.py")
"""Of the suite, run with the wheel."""


def run(*command: str | Path, folder: Path, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked, and made of what git knows: nothing that lies about in a checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    source = folder / "source"
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, folder=source)
    (packed,) = folder.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist. Objects are taken from this checkout where ninja finds them up to date,
    so the targets are those that it was installed with."""
    for objects in (ROOT / "build").glob("native-*"):
        shutil.copytree(objects, sdist / "build" / objects.name)
    module, folder = native.module(), tmp_path_factory.mktemp("wheel")
    chosen = {"SUPCLAP_CUDA": "0"}
    if module.built_with_cuda:
        chosen = {"SUPCLAP_CUDA_ARCHS": ";".join(module.cuda.architectures())}
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder)
    run(*command, folder=sdist, **chosen)
    (found,) = folder.glob("*.whl")
    return found


def test_what_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {"supclap_kernels", "supclap"} <= tops
    assert all(top in ("supclap_kernels", "supclap") or "dist-info" in top for top in tops)
    for name in ("supclap_kernels/MATH.md", "supclap_kernels/py.typed", "supclap/phrases.toml"):
        assert name in names
    assert sum(name.endswith(".so") for name in names) == 1
    assert wheel.stat().st_size < 8e6


@pytest.mark.skipif(platform.machine() != "x86_64", reason="auditwheel's names are per machine")
def test_auditwheel_names_it_manylinux(wheel):
    said = run(sys.executable, "-m", "auditwheel", "show", wheel, folder=wheel.parent)
    assert "manylinux_2_" in said, said


def test_a_machine_without_compilers_installs_and_uses_it(wheel, tmp_path):
    """An environment of its own, which borrows PyTorch and pytest from this one."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    alone = {"PATH": str(environment / "bin"), "CUDA_HOME": "", "SUPCLAP_CACHE": str(tmp_path)}
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, folder=tmp_path, **alone)
    assert shutil.which("c++", path=alone["PATH"]) is None
    packages = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    borrowed = Path(pytest.__file__).resolve().parents[1]
    (packages / "site-packages" / "borrowed.pth").write_text(f"{borrowed}\n")
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npythonpath = tests/helpers\nmarkers =\n    gpu: needs a CUDA device\n"
    )
    where = "import supclap_kernels, supclap; print(supclap_kernels.__file__, supclap.__file__)"
    assert run(python, "-c", where, folder=tmp_path, **alone).count(str(environment)) == 2
    says = run(python, "-m", "supclap_kernels", folder=tmp_path, **alone)
    assert "cpu        ok" in says
    command = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CORE)
    assert " passed" in run(*command, folder=tmp_path, **{**alone, "SUPCLAP_TESTS": ""})
