"""The README: short, with snippets that run and the two set-up commands as promised."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_short():
    assert len(TEXT.splitlines()) < 150


def test_setup_commands():
    assert 'pip install -c constraints.txt -e ".[train]" && supclap demo' in TEXT
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in TEXT


def test_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(snippets) >= 3
    exec(compile("\n".join(snippets), "README.md", "exec"), {})


def test_table_is_the_committed_results():
    command = [sys.executable, "-m", "bench.plot", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
