"""Prints the project's bars after the benchmarks."""

from collections.abc import Callable

import pytest

from .cases import Row, bars, report
from .run import measure_group

ROWS: dict[str, list[Row]] = {}
"""Of the groups measured so far."""


@pytest.fixture(scope="session")
def measured() -> Callable[[str, int], list[Row]]:
    """A group's rows: measured once, when a test first asks, the memory only for a bar."""

    def rows_of(group: str, rounds: int) -> list[Row]:
        if group not in ROWS:
            memory = any(bar.top[0] == group for bar in bars() if bar.measure == "memory")
            ROWS[group] = measure_group(group, rounds, memory)
        return ROWS[group]

    return rows_of


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ROWS:
        terminalreporter.section("bars (measured <= bar; tests assert them with slack)")
        for line in report([row for rows in ROWS.values() for row in rows]):
            terminalreporter.write_line(line)
