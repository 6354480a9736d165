"""Prints the project's bars after the benchmarks."""

import pytest

from . import suite


class Measured:
    """The groups measured so far; each once, when a test first asks, its memory only for a bar."""

    def __init__(self) -> None:
        self.rows: dict[str, list[suite.Row]] = {}

    def group(self, name: str, rounds: int) -> list[suite.Row]:
        if name not in self.rows:
            memory = any(b.top[0] == name for b in suite.bars() if b.measure == "memory")
            self.rows[name] = suite.measure(suite.groups()[name], rounds, memory)
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
        for line in suite.report(rows):
            terminalreporter.write_line(line)
