"""The README: short, with snippets that run and the two set-up commands as promised."""

import re
import subprocess
import sys
from pathlib import Path

import soundfile
from clips import write_clips

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_short():
    assert len(TEXT.splitlines()) < 150


def test_setup_commands():
    assert 'pip install -c constraints.txt -e ".[train]" && supclap demo' in TEXT
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in TEXT


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_clips(tmp_path)
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).write_bytes(table.read_bytes())
    wave, rate = soundfile.read(tmp_path / "dog.wav")
    for name in ("a.wav", "b.flac"):
        soundfile.write(tmp_path / name, wave, rate)
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(snippets) >= 3
    exec(compile("\n".join(snippets), "README.md", "exec"), {})


def test_table_is_the_committed_results():
    command = [sys.executable, "-m", "bench.plot", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
