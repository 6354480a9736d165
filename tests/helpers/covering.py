"""Few combinations of options in which every pair of values of two options occurs, and a core of
them for every day."""

import itertools
import os
import random
from pathlib import Path
from typing import Any, TypeVar

import pytest

ALL = os.environ.get("SUPCLAP_TESTS") == "all"
"""`pytest --all` sets the variable, so that the processes that tests start know it, too."""
in_all = pytest.mark.skipif(not ALL, reason="a long test: runs with `pytest --all`")
Item = TypeVar("Item")


def core(cases: list[Item], every: int = 4) -> list[Item]:
    """Every so many of the cases, from the first on; all of them with `pytest --all`."""
    return cases if ALL else cases[::every]


def thin_out(items: list[pytest.Item], folder: Path, every: int = 3) -> None:
    """Keep every so many of the tests of this folder; all of them with `pytest --all`."""
    own = [item for item in items if folder in item.path.parents]
    left_out = set(own) - set(core(own, every))
    items[:] = [item for item in items if item not in left_out]


def pairs_of(row: dict[str, Any]) -> set[tuple[Any, ...]]:
    items = [(name, str(value)) for name, value in row.items()]
    return set(itertools.combinations(items, 2))


def covering(least: int = 0, seed: int = 0, **values: tuple[Any, ...]) -> list[dict[str, Any]]:
    """At least `least` of them; greedy, among random candidates, the same for the same seed."""
    generator = random.Random(seed)
    missing = {
        ((a, str(x)), (b, str(y)))
        for a, b in itertools.combinations(values, 2)
        for x, y in itertools.product(values[a], values[b])
    }
    chosen: list[dict[str, Any]] = []
    while missing or len(chosen) < least:
        candidates = [{n: generator.choice(v) for n, v in values.items()} for _ in range(60)]
        if missing:  # one of them has a pair that is still missing
            (a, x), (b, y) = generator.choice(sorted(missing))
            for name, wanted in ((a, x), (b, y)):
                candidates[0][name] = next(v for v in values[name] if str(v) == wanted)
        best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        chosen.append(best)
    return chosen
