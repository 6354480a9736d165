"""Rules of the house that a machine can check."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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


def test_imports_point_one_way():
    """The specification stands alone, and nothing below `ops` imports what is above it."""
    package = ROOT / "supclap_kernels"
    forbidden = {
        "reference.py": ("ops", "dispatch", "loss", "backends", "native", "gradients"),
        "gradients.py": ("ops", "dispatch", "loss", "backends", "native"),
        "native.py": ("ops", "dispatch", "loss", "backends"),
        "dispatch.py": ("ops", "loss"),
        "ops.py": ("loss",),
    }
    for name, modules in forbidden.items():
        text = (package / name).read_text()
        for module in modules:
            assert not re.search(rf"^from \.{module}\b|^from \. import .*\b{module}\b", text, re.M)
    for path in (package / "backends").glob("*.py"):
        assert not re.search(r"^from \.\.(ops|dispatch|loss)\b", path.read_text(), re.M), path
