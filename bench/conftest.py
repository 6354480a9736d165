"""Prints the project's bars after the benchmarks."""

import pytest

from .cases import Row, bars, report
from .run import measure_group


class Measured:
    """The groups measured so far; each once, when a test first asks, its memory only for a bar."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {}

    def group(self, name: str, rounds: int) -> list[Row]:
        if name not in self.rows:
            memory = any(bar.top[0] == name for bar in bars() if bar.measure == "memory")
            self.rows[name] = measure_group(name, rounds, memory)
        return self.rows[name]


MEASURED = pytest.StashKey[Measured]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = Measured()


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Measured:
    return request.config.stash[MEASURED]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = [row for group in config.stash[MEASURED].rows.values() for row in group]
    if rows:
        terminalreporter.section("bars (measured <= bar; tests assert them with slack)")
        for line in report(rows):
            terminalreporter.write_line(line)
