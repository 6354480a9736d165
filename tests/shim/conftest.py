"""The kernels of csrc/cuda on CPU tensors. Run through tests/shim/run.py."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from covering import thin_out

from supclap_kernels import direct, native

LIMIT = int(os.environ.get("SHIM_LIMIT", "60"))
"""Seconds a case may take."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The host is slow: without `--all` it runs every third case."""
    thin_out(items, Path(__file__).parent)


@pytest.fixture(autouse=True)
def watched(request: pytest.FixtureRequest) -> Iterator[None]:
    """A case that hangs ends the run; one in which a sanitizer found something fails."""
    log = os.environ.get("SHIM_LOG")  # the sanitizer writes to LOG.PID
    reports = Path(f"{log}.{os.getpid()}") if log else None
    before = reports.stat().st_size if reports and reports.exists() else 0
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it does
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    mutant = request.module.__name__ == "mutants"  # reports are what it hopes for
    if not mutant and reports and reports.exists() and reports.stat().st_size > before:
        pytest.fail(reports.read_text()[before : before + 4000], pytrace=False)


@pytest.fixture
def device() -> Iterator["Device"]:
    device = Device()
    yield device
    device.set(*Device.DEFAULT)


class Device:
    """The stand-in's multiprocessors, the order in which threads run, and the side of tiles."""

    DEFAULT = (5, 0, 0)
    way = "cuda"
    """The one launch with these tiles, or what takes a batch by its size."""

    def set(self, multiprocessors: int, schedule: int, side: int) -> None:
        module = native.cuda()
        module.set_multiprocessors(multiprocessors)
        module.set_schedule(schedule)
        self.way = f"cuda:single:{side}" if side else "cuda"
        direct.forget()

    def vary(self, n: int) -> None:
        """Every combination, one after the other."""
        schedules = native.cuda().SCHEDULES
        sides = (16, 32, 64)
        self.set((5, 8, 3)[n // 9 % 3], n % schedules, sides[n // 3 % 3])


@pytest.fixture(params=["cuda", "panel"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
