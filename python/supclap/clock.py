"""Where the time of training goes."""

from __future__ import annotations

import time

import torch

PARTS = ("data", "model", "loss")


class Clock:
    """Seconds of each part since the last line that was written: waiting for batches; encoders and
    optimiser; the loss, its gradient and the statistics."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.pairs = dict.fromkeys(PARTS, 0.0), 0
        self.last = self.now()

    def now(self) -> float:
        """The time when the device has done what it was told so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def add(self, part: str | None) -> None:
        """Counts the time since the last call for a part; None: for none, it was no training."""
        now = self.now()
        if part is not None:
            self.seconds[part] += now - self.last
        self.last = now

    def line(self) -> dict[str, float]:
        """Returns pairs per second and the share of each part, and starts again."""
        total = sum(self.seconds.values()) or float("inf")
        line = {"pairs_per_second": self.pairs / total}
        line |= {part: seconds / total for part, seconds in self.seconds.items()}
        self.seconds, self.pairs = dict.fromkeys(PARTS, 0.0), 0
        return line
