"""What a run writes line by line: JSONL always, TensorBoard and Weights & Biases if asked."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

from .config import TrainConfig, config_text
from .files import write_text


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads all objects of a JSONL file, without a last line that was cut off; no file has none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def open_log(path: Path, step: int) -> TextIO:
    """Opens a JSONL file to append to, of which nothing after `step` is kept."""
    kept = "".join(json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step)
    write_text(path, kept)
    return path.open("a", encoding="utf-8")


def start_wandb(config: TrainConfig, step: int, names: list[str]) -> Any:
    """Begins a run of Weights & Biases, or goes on with that of an interrupted one."""
    wandb = importlib.import_module("wandb")
    kept = config.out / "wandb_id.txt"
    known = kept.read_text(encoding="utf-8") if step and kept.exists() else None
    run = wandb.init(
        project="supclap", name=config.out.name, id=known, resume="allow", dir=str(config.out),
        config=json.loads(config_text(config)),
    )  # fmt: skip
    write_text(kept, run.id)
    for name in names:  # validations are fewer than steps
        run.define_metric(f"{name}/*", step_metric="step")
    return run


class Logs:
    """What a run writes beside its checkpoints; nothing on other ranks than the first."""

    def __init__(self, config: TrainConfig, step: int, first: bool) -> None:
        names = ("log", "val", "speed", *(["diagnostics"] if config.diagnose_every else []))
        run = config.out
        self.files = {name: open_log(run / f"{name}.jsonl", step) for name in names if first}
        self.board: Any = None
        if config.tensorboard and first:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run / "tensorboard", purge_step=step + 1)
        self.wandb = start_wandb(config, step, list(names)) if config.wandb and first else None

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Writes one object and hands it to the system at once."""
        if name in self.files:
            self.files[name].write(json.dumps(line) + "\n")
            self.files[name].flush()
        if self.board is None and self.wandb is None:
            return
        numbers = {
            f"{name}/{key}/{part}".rstrip("/"): number
            for key, value in line.items()
            for part, number in (value.items() if isinstance(value, dict) else [("", value)])
            if isinstance(number, int | float) and key not in ("step", "epoch")
        }
        if self.board is not None:
            for title, number in numbers.items():
                self.board.add_scalar(title, number, line["step"])
        if self.wandb is not None:
            self.wandb.log(numbers | {"step": line["step"], "epoch": line["epoch"]})

    def sync(self) -> None:
        for file in self.files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
