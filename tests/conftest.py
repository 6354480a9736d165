"""Shared by all tests: few threads, and uninitialised memory that is NaN where asked for."""

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

# These run in processes of their own: Triton reads its variable when it is imported
# (backends/test_triton.py), and the other names a module to load (backends/test_shim.py).
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]
collect_ignore += [] if os.environ.get("SUPCLAP_SHIM") else ["shim"]


# Whoever tuned this machine: the tests see what is there for everybody.
os.environ["SUPCLAP_CACHE"] = tempfile.mkdtemp(prefix="supclap-")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="all cases, not only the core of each set")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all"):
        os.environ["SUPCLAP_TESTS"] = "all"


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that a second thread brings nothing, and costs much on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every `torch.empty` is filled with NaN, so a value that was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
