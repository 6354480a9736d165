"""The build: which instruction sets and GPU targets are compiled, and what becomes of a bad nvcc.

No test here compiles the module: the questions are in build_tools/toolchain.py and the graph in
setup.py, and both are called with compilers made for the purpose.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import core, in_all

from supclap_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"))  # not as __main__: builds nothing
toolchain = sys.modules["build_tools.toolchain"]
BuildError = toolchain.BuildError

needs_cuda_build = pytest.mark.skipif(
    not _native.built_with_cuda, reason="the module was built without CUDA"
)

# ----------------------------------------------------------------------------------- the CPU module


def test_module_lists_its_instruction_sets():
    assert _native.isa_compiled[0] == "baseline"
    assert set(_native.isa_compiled) <= {"baseline", "avx2", "avx512", "avx512bf16"}
    assert isinstance(_native.built_with_cuda, bool)


def test_every_instruction_set_the_compiler_knows_was_compiled():
    objects = compiled_objects()
    for isa in toolchain.cpu_variants(toolchain.Compiler(["c++"])):
        if any(path.name.endswith(f".{isa}.o") for path in objects):
            assert isa in _native.isa_compiled


def test_instruction_sets_share_no_function():
    """An inline function compiled for AVX-512 must not become everybody's copy.

    The linker keeps one copy of each weak symbol, whichever object it comes from. So every weak
    symbol in an object of one instruction set must belong to the namespace of that set.
    """
    objects = [path for path in compiled_objects() if isa_of(path) not in ("", "baseline")]
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the objects of a build in this checkout, and nm")
    for path in objects:
        assert shared_symbols(path, isa_of(path)) == []


def test_shared_function_is_found(tmp_path):
    """The test above can fail: an inline function outside the namespace is reported."""
    source = tmp_path / "both.cpp"
    source.write_text(
        "__attribute__((noinline)) inline float shared(float x) { return x * 2; }\n"
        "namespace avx2 {\n"
        "__attribute__((noinline)) inline float own(float x) { return x * 3; }\n"
        "float f(float x) { return shared(x) + own(x); }\n"
        "}\n"
    )
    target = tmp_path / "both.avx2.o"
    subprocess.run(["c++", "-O2", "-c", str(source), "-o", str(target)], check=True)
    assert shared_symbols(target, "avx2") == ["shared(float)"]


def compiled_objects() -> list[Path]:
    """Objects the last build of this interpreter's module left in the checkout."""
    tag = f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    return sorted((ROOT / "build" / tag / "csrc" / "cpu").glob("*.o"))


def isa_of(path: Path) -> str:
    return path.name.split(".")[1] if path.name.count(".") == 2 else ""


def shared_symbols(path: Path, isa: str) -> list[str]:
    """Weak functions and objects defined in `path` that do not name the namespace `isa`."""
    listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True)
    weak = re.findall(r"^[0-9a-f]+ [WVu] (.+)$", listing.stdout, re.MULTILINE)
    return [name for name in weak if f"{isa}::" not in name and not name.startswith("DW.ref.")]


def test_compiler_that_is_missing_or_too_old_is_named(tmp_path):
    with pytest.raises(BuildError, match="'no-such-c\\+\\+' is not on PATH"):
        toolchain.Compiler(["no-such-c++"]).check()
    old = script(tmp_path / "old-c++", "exit 1")
    with pytest.raises(BuildError, match=r"old-c\+\+.* -std=c\+\+17"):
        toolchain.Compiler([str(old)]).check()


def test_flags_the_compiler_does_not_know_are_left_out(tmp_path):
    assert toolchain.Compiler(["c++"]).known(["-O2", "-fno-such-flag"]) == ["-O2"]
    no_bf16 = script(tmp_path / "c++", 'case "$*" in *avx512bf16*) exit 1;; esac; exec c++ "$@"')
    known = toolchain.cpu_variants(toolchain.Compiler(["c++"]))
    without = toolchain.cpu_variants(toolchain.Compiler([str(no_bf16)]))
    assert set(without) == set(known) - {"avx512bf16"}
    other = script(tmp_path / "arm-c++", 'exec c++ -U__x86_64__ "$@"')
    assert toolchain.cpu_variants(toolchain.Compiler([str(other)])) == {}


def test_no_flag_ties_the_module_to_this_machine():
    flags = [*SETUP["CXX_FLAGS"], *toolchain.CPU_FLAGS, *toolchain.LOOP_FLAGS]
    flags += [flag for isa in toolchain.INSTRUCTION_SETS.values() for flag in isa]
    assert not [f for f in flags if f.startswith(("-march", "-mtune", "-mcpu")) or "fast-math" in f]


def test_a_rebuild_compiles_what_changed(tmp_path):
    """Second run: nothing. After an edit of a header: the sources that include it, and the link."""
    folder = tmp_path / "a folder"  # a space and a dollar are quoted in the graph
    folder.mkdir()
    (folder / "$shared.h").write_text("inline int f() { return 1; }\n")
    (folder / "user.cpp").write_text('#include "$shared.h"\nint g() { return f(); }\n')
    (folder / "other.cpp").write_text("int h() { return 2; }\n")
    graph = SETUP["NinjaGraph"](folder, cxx="c++", nvcc="false", shared="-shared")
    graph.compile("cxx", folder / "user.cpp", ["-fPIC", "-DNAME=$x"])
    graph.compile("cxx", folder / "other.cpp", ["-fPIC"])
    graph.link(folder / "module.so", [])

    def run() -> set[str]:
        before = {path: path.stat().st_mtime_ns for path in folder.glob("*.*o")}
        graph.run()
        return {p.name for p in folder.glob("*.*o") if before.get(p) != p.stat().st_mtime_ns}

    assert run() == {"user.o", "other.o", "module.so"}
    assert run() == set()
    (folder / "$shared.h").write_text("inline int f() { return 3; }\n")
    assert run() == {"user.o", "module.so"}


# ------------------------------------------------------------------------------------- GPU targets


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("80;90a;90+PTX", ["80", "90a", "90+PTX"]),
        ("8.0, 9.0A 10.0f", ["80", "90a", "100f"]),
        ("120+ptx;;120+PTX", ["120+PTX"]),
    ],
)
def test_archs(text, names):
    assert [str(arch) for arch in toolchain.parse_archs(text)] == names


@pytest.mark.parametrize("text", ["sm_90", "80;hopper", "9", "90b", "90+", "80;90 +PTX", "1000"])
def test_malformed_arch_is_named(text):
    with pytest.raises(BuildError, match="SUPCLAP_CUDA_ARCHS=.*is not a GPU target.*'80;90a"):
        toolchain.parse_archs(text)


def test_arch_list_without_sense_is_refused():
    with pytest.raises(BuildError, match="names no GPU target.*SUPCLAP_CUDA=0"):
        toolchain.parse_archs(" ; ")
    with pytest.raises(BuildError, match=r"write '90a;90\+PTX'"):
        toolchain.parse_archs("90a+PTX")


def test_gencode():
    def flags(text: str) -> list[str]:
        return [f.split("=", 1)[1] for f in toolchain.gencode(toolchain.parse_archs(text))]

    assert flags("80;90a;90+PTX") == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90,code=compute_90",
    ]
    assert flags("90+PTX") == ["arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]
    assert flags("100f") == ["arch=compute_100f,code=sm_100f"]


# ------------------------------------------------------------------------------- nvcc: there or not


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(folder: Path, *, release: str = "13.0", compiles: bool = True) -> Path:
    """A wrapper outside its toolkit, as module systems install them. Returns its folder."""
    toolkit = folder / "toolkit"
    (toolkit / "lib64").mkdir(parents=True)
    (toolkit / "lib64" / "libcudart_static.a").touch()
    compile_ = 'while [ "$1" != -o ]; do shift; done; : > "$2"'
    script(
        folder / "wrapper" / "bin" / "nvcc",
        f"""case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1";;
  --dryrun) echo '#$ TOP={toolkit}/bin/..' >&2;;
  --list-gpu-arch) echo compute_80; echo compute_90; echo compute_120;;
  *) {compile_ if compiles else "echo 'rows.cu(7): error: no such thing' >&2; exit 2"};;
esac""",
    )
    (toolkit / "bin").mkdir()
    return folder / "wrapper"


@pytest.fixture
def no_default_home(monkeypatch, tmp_path):
    """This machine's own toolkit is out of sight."""
    monkeypatch.setattr(toolchain, "DEFAULT_CUDA_HOMES", (tmp_path / "nowhere",))


@pytest.mark.usefixtures("no_default_home")
class TestNvcc:
    def test_found_under_cuda_home_on_path_or_in_the_usual_place(self, tmp_path, monkeypatch):
        home = fake_nvcc(tmp_path)
        for env in ({"CUDA_HOME": str(home)}, {"CUDA_PATH": str(home)}, {"PATH": f"{home}/bin"}):
            assert toolchain.find_nvcc(env) == home / "bin" / "nvcc"
        monkeypatch.setattr(toolchain, "DEFAULT_CUDA_HOMES", (home,))
        assert toolchain.find_nvcc({}) == home / "bin" / "nvcc"

    @pytest.mark.parametrize("choice", [{}, {"SUPCLAP_CUDA": "1"}])
    def test_a_wrapper_leads_to_its_toolkit(self, tmp_path, choice):
        toolkit = toolchain.cuda_toolkit({"CUDA_HOME": str(fake_nvcc(tmp_path)), **choice})
        assert toolkit.home == tmp_path / "toolkit"
        assert toolkit.cudart == tmp_path / "toolkit" / "lib64" / "libcudart_static.a"
        assert toolkit.version == (13, 0)
        assert toolkit.numbers == {80, 90, 120}

    def test_absent_means_cpu_only(self):
        assert toolchain.cuda_toolkit({}) is None
        assert toolchain.cuda_toolkit({"SUPCLAP_CUDA": "0"}) is None

    def test_absent_and_required_is_an_error(self):
        with pytest.raises(BuildError, match="SUPCLAP_CUDA=1 requires nvcc.*Install.*or unset"):
            toolchain.cuda_toolkit({"SUPCLAP_CUDA": "1"})

    def test_zero_does_not_even_ask(self, tmp_path):
        script(tmp_path / "bin" / "nvcc", "echo broken >&2; exit 3")
        env = {"CUDA_HOME": str(tmp_path), "SUPCLAP_CUDA": "0"}
        assert toolchain.cuda_toolkit(env) is None

    def test_other_choices_are_refused(self):
        with pytest.raises(BuildError, match="SUPCLAP_CUDA='yes': must be 0 .* 1 .* or unset"):
            toolchain.cuda_toolkit({"SUPCLAP_CUDA": "yes"})

    @pytest.mark.parametrize("choice", [{}, {"SUPCLAP_CUDA": "1"}])
    def test_failing_is_an_error_that_shows_what_it_said(self, tmp_path, choice):
        script(tmp_path / "bin" / "nvcc", "echo 'licence expired' >&2; exit 3")
        with pytest.raises(BuildError, match="status 3:\nlicence expired\n.*SUPCLAP_CUDA=0"):
            toolchain.cuda_toolkit({"CUDA_HOME": str(tmp_path), **choice})

    def test_something_else_named_nvcc_is_an_error(self, tmp_path):
        script(tmp_path / "bin" / "nvcc", "echo hello")
        with pytest.raises(BuildError, match="does not answer as nvcc does"):
            toolchain.cuda_toolkit({"CUDA_HOME": str(tmp_path)})

    def test_too_old_is_an_error(self, tmp_path):
        home = fake_nvcc(tmp_path, release="11.8")
        with pytest.raises(BuildError, match=r"needs CUDA >= 12\.0; .* is 11\.8"):
            toolchain.cuda_toolkit({"CUDA_HOME": str(home)})

    def test_toolkit_without_static_runtime_is_an_error(self, tmp_path):
        home = fake_nvcc(tmp_path)
        (tmp_path / "toolkit" / "lib64" / "libcudart_static.a").unlink()
        with pytest.raises(BuildError, match="has no libcudart_static.a .looked in .*lib64"):
            toolchain.cuda_toolkit({"CUDA_HOME": str(home)})

    def test_targets_it_does_not_know(self, tmp_path):
        """Left out of the default, an error in a list given by hand."""
        toolkit = toolchain.cuda_toolkit({"CUDA_HOME": str(fake_nvcc(tmp_path))})
        assert [str(arch) for arch in toolkit.archs({})] == ["80", "90a", "90+PTX"]
        assert [str(a) for a in toolkit.archs({"SUPCLAP_CUDA_ARCHS": "120"})] == ["120"]
        with pytest.raises(BuildError, match="does not compile for 100; it knows 80, 90, 120"):
            toolkit.archs({"SUPCLAP_CUDA_ARCHS": "100"})

    @pytest.mark.parametrize(
        "answer, names",
        [
            ("echo 9.0; echo 9.0", ["90a"]),
            ("echo 12.0; echo 8.0", ["80", "120"]),
            ("echo 10.3", ["80", "90a", "90+PTX"]),  # one that this toolkit does not know
            ("echo 9.0; echo 10.3", ["80", "90a", "90+PTX"]),
            ("echo 9.0; echo 7.5", ["80", "90a", "90+PTX"]),  # too old
            ("echo '[N/A]'", ["80", "90a", "90+PTX"]),
            ("exit 9", ["80", "90a", "90+PTX"]),
            ("true", ["80", "90a", "90+PTX"]),
        ],
    )
    def test_a_module_that_stays_here_is_for_the_gpus_that_are_here(self, tmp_path, answer, names):
        toolkit = toolchain.cuda_toolkit({"CUDA_HOME": str(fake_nvcc(tmp_path))})
        script(tmp_path / "driver" / "nvidia-smi", answer)
        env = {"PATH": f"{tmp_path / 'driver'}:{os.environ['PATH']}"}
        assert [str(arch) for arch in toolkit.archs(env)] == names
        assert [str(arch) for arch in toolkit.archs(env, stays=False)] == ["80", "90a", "90+PTX"]
        asked = {**env, "SUPCLAP_CUDA_ARCHS": "80"}
        assert [str(arch) for arch in toolkit.archs(asked)] == ["80"]

    def test_a_wheel_has_code_for_every_gpu(self):
        names = [str(arch) for arch in toolchain.parse_archs(toolchain.WHEEL_CUDA_ARCHS)]
        assert names == ["80", "89", "90a", "100", "90+PTX"]

    def test_a_kernel_that_does_not_compile_stops_the_build(self, tmp_path):
        for compiles in (True, False):
            folder = tmp_path / str(compiles)
            nvcc = fake_nvcc(folder, compiles=compiles) / "bin" / "nvcc"
            graph = SETUP["NinjaGraph"](folder, cxx="touch", nvcc=shlex.quote(str(nvcc)), shared="")
            graph.compile("cuda", Path("csrc/cuda/rows/rows.cu"), [])
            graph.link(folder / "module.so", [])
            if compiles:
                graph.lines[-2:] = [f"default {graph.objects[0]}"]
                graph.run()
            else:
                with pytest.raises(BuildError, match=r"rows\.cu\(7\): error: no such thing"):
                    graph.run()


# ---------------------------------------------------------------------------------- the CUDA module


@needs_cuda_build
def test_cuda_module_lists_its_targets():
    names = _native.cuda.architectures()
    assert [str(arch) for arch in toolchain.parse_archs(";".join(names))] == names
    assert _native.cuda.device_count() >= 0


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_launch_without_a_device_names_the_kernel():
    assert _native.cuda.device_count() == 0
    p = _native.cuda.CudaProblem()
    p.N = p.D = p.width = 4
    with pytest.raises(RuntimeError, match="^prepare_rows: .+"):
        _native.cuda.prepare_rows(p, 0)


def compile_report(*arguments: str) -> list[dict[str, Any]]:
    """Asserts what all kernels keep: no spills (Hopper's large tiles: up to 200 bytes, outside of
    the product loop), and the chip's shared memory."""
    pytest.importorskip("triton")  # its cuobjdump
    command = [sys.executable, "-m", "bench.aot", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        assert line["spill_bytes"] <= (200 if line["source"] in ("sweep", "sweep.cu") else 0), line
        assert line["registers"] <= 255 and line["static_shared"] == 0, line
        assert line["dynamic_shared"] <= 227 * 1024, line
    return lines


@needs_cuda_build
@pytest.mark.parametrize("arch", core(["sm_80", "sm_90a"]))
def test_cuda_kernels_compile_well(arch):
    """Tensor cores wherever 16-bit numbers are multiplied."""
    if arch[3:] not in _native.cuda.architectures():
        pytest.skip(f"not compiled for {arch}")
    lines = compile_report("--backend", "cuda", "--arch", arch)
    assert len(lines) > 40
    for line in lines:
        if "single_kernel" in line["name"]:
            assert (line["hmma"] > 0) == ("float16" in line["name"].lower()), line


@in_all
@needs_cuda_build
def test_hopper_kernels_compile_well():
    """Asynchronous tensor cores, not one after the other, and copies by tensor maps."""
    if "90a" not in _native.cuda.architectures():
        pytest.skip("not compiled for sm_90a")
    lines = compile_report("--backend", "hopper")
    assert len(lines) == 28
    assert all(line["hgmma"] == 4 and line["utmaldg"] > 0 for line in lines)
    assert not any(line["serialized"] for line in lines)


@needs_cuda_build
def test_module_is_small():
    """A wheel may have 8 MB, with more targets than this machine builds."""
    assert Path(_native.__file__).stat().st_size < 5.5e6
