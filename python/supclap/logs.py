"""What a run writes line by line: JSONL always, TensorBoard if asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .files import write_text


class Lines:
    """A JSONL file to append to, of which nothing after `step` is kept."""

    def __init__(self, path: Path, step: int = 0) -> None:
        kept = "".join(json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step)
        write_text(path, kept)
        self.stream = path.open("a", encoding="utf-8")

    def append(self, line: dict[str, Any]) -> None:
        """Write one object and hand it to the system at once."""
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()

    def sync(self) -> None:
        os.fsync(self.stream.fileno())

    def close(self) -> None:
        self.stream.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSONL file, without a last line that was cut off; none if there is none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class Logs:
    """What a run writes beside its checkpoints; nothing on other ranks than the first."""

    def __init__(self, config: TrainConfig, step: int, first: bool) -> None:
        names = ("log", "val", *(["diagnostics"] if config.diagnose_every else []))
        run = config.out
        self.files = {name: Lines(run / f"{name}.jsonl", step) for name in names if first}
        self.board: Any = None
        if config.tensorboard and first:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def append(self, name: str, line: dict[str, Any]) -> None:
        if name in self.files:
            self.files[name].append(line)
        if self.board is not None:
            for key, value in line.items():
                parts = value.items() if isinstance(value, dict) else [("", value)]
                for part, number in parts:
                    if isinstance(number, int | float) and key not in ("step", "epoch"):
                        self.board.add_scalar(
                            f"{name}/{key}/{part}".rstrip("/"), number, line["step"]
                        )

    def sync(self) -> None:
        for file in self.files.values():
            file.sync()

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        if self.board is not None:
            self.board.close()
