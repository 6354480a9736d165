"""How far something is: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

OFTEN, SELDOM = 0.5, 10.0  # seconds between two looks of a bar, and between two lines
LINE = (
    "{desc}: {percentage:3.0f}%, {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"
)


class Bar(tqdm):
    """tqdm, without a bar and carriage returns where nobody watches."""

    disable: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        self.watched, self.shown = sys.stderr.isatty(), 0
        options.setdefault("mininterval", OFTEN if self.watched else SELDOM)
        if not self.watched:
            options["bar_format"] = LINE
        super().__init__(*args, **options)

    def status_printer(self, file: Any) -> Callable[[str], None]:
        if self.watched:
            return tqdm.status_printer(file)

        def print_line(text: str) -> None:
            if text.strip() and self.n != self.shown:
                print(text.rstrip(), file=file, flush=True)
                self.shown = self.n

        return print_line

    def close(self) -> None:
        if self.watched or self.disable:
            super().close()
            return
        self.disable = True
        self._decr_instances(self)
        self.display()


def say(text: str) -> None:
    """Prints a line; a bar that is shown stays below it."""
    if sys.stderr.isatty():
        tqdm.write(text)
    else:
        print(text, flush=True)
