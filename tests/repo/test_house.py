"""Rules of the house that a machine can check."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")


def tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def test_files_stay_short():
    long = [
        f"{path.relative_to(ROOT)}: {count}"
        for path in tracked()
        if path.suffix in SUFFIXES and (count := len(path.read_text().splitlines())) > 400
    ]
    assert not long


def test_only_the_acceptance_rule_judges_errors():
    pattern = re.compile(r"\b[ar]tol\s*=|allclose|assert_close|approx\(")
    offenders = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        if path.suffix == ".py" and path.name != Path(__file__).name
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line) and "forbid" not in line
    ]
    assert not offenders


def modules_of(package: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(part for part in parts if part != "__init__")] = path
    return modules


def imported_names(name: str, path: Path) -> set[str]:
    """What a module imports, at its top or within a function, as absolute dotted names: of
    `from X import y` both X and X.y, whichever is a module."""
    names = set()
    inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parents = inside.split(".")[: len(inside.split(".")) - node.level + 1]
            base = ".".join([*parents, *([node.module] if node.module else [])])
            source = base if node.level else str(node.module)
            names |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return names


def import_graph(package: Path) -> dict[str, set[str]]:
    """Which modules of the package each of them imports. A package's `__init__` is left out where
    a module of it is imported."""
    modules = modules_of(package)
    graph = {}
    for name, path in modules.items():
        found = {other for other in imported_names(name, path) if other in modules} - {name}
        graph[name] = {x for x in found if not any(y.startswith(x + ".") for y in found)}
    return graph


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def test_the_import_graph_sees_every_spelling(tmp_path):
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("")
    for name in ("a", "b", "c", "d", "inner/e"):
        (package / f"{name}.py").write_text("")
    (package / "inner" / "f.py").write_text(
        "from .. import a\nfrom ..b import x\nimport package.c\n"
        "def f():\n    from package import d\n    from . import e\n"
    )
    wanted = {"package.a", "package.b", "package.c", "package.d", "package.inner.e"}
    assert import_graph(package)["package.inner.f"] == wanted


@pytest.mark.parametrize("package", ["supclap_kernels", "python/supclap"])
def test_imports_have_no_circles(package):
    graph = import_graph(ROOT / package)
    assert [name for name in graph if name in reached(graph, name)] == []


FLOORS = ["loss", "distributed", "ops", "dispatch", "backends"]
"""No floor imports one above it, by whatever way."""
ALONE = {
    "reference": ("ops", "dispatch", "loss", "backends", "native", "gradients"),
    "gradients": ("ops", "dispatch", "loss", "backends", "native"),
    "native": ("ops", "dispatch", "loss", "backends"),
}


def test_imports_point_one_way():
    graph = import_graph(ROOT / "supclap_kernels")
    above: dict[str, tuple[str, ...]] = dict(ALONE)
    for n, floor in enumerate(FLOORS):
        above[floor] = tuple(FLOORS[:n])
    root = "supclap_kernels."
    for name in graph:
        short = name.removeprefix(root)
        for floor, forbidden in above.items():
            if short != floor and not short.startswith(floor + "."):
                continue
            wrong = [
                x for x in reached(graph, name)
                if any((x + ".").startswith(f"{root}{module}.") for module in forbidden)
            ]  # fmt: skip
            assert not wrong, f"{name} imports {wrong}"


def test_families_do_not_know_each_other():
    """What the CPU, Triton and CUDA share lies in backends itself, which knows none of them."""
    root, families = "supclap_kernels.backends.", ("cpu", "triton", "cuda")
    graph = import_graph(ROOT / "supclap_kernels")
    for name in (name for name in graph if name.startswith(root)):
        own = name.removeprefix(root).partition(".")[0]
        others = [f"{root}{family}" for family in families if family != own]
        assert not [x for x in reached(graph, name) if x.startswith(tuple(others))], name
