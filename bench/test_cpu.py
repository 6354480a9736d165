"""`pytest bench/`: forward and backward of every peer on the CPU, and the project's bars with
slack.

Every peer passes the gate (bench/gate.py) before it is timed. The exact bars are printed at the
end; the asserted ones are loose, because a shared machine disturbs times by a factor: they catch a
collapse, not a few per cent. For numbers to publish run `python -m bench.run`.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import gate
from .cases import GROUPS, MAIN, SIZES, Bar, Case, Entry, Row, bars
from .inputs import leaves_of, make_inputs
from .peers import PEERS
from .timer import Step

Measured = Callable[[str, int], list[Row]]
TIME_SLACK = 3.0
"""On the ratio of the least times."""
MEMORY_SLACK = 1.1
ROUNDS = {"large": 2}
"""Rounds of an interleaved run here; 5 where nothing is said."""

ENTRIES = [entry for N in SIZES for entry in GROUPS[f"one-sided-{N}"]]


def named(entry: Entry) -> str:
    peer, case = entry
    return f"{case.N}-{peer}"


@pytest.mark.parametrize("entry", ENTRIES, ids=named)
def test_step(benchmark: BenchmarkFixture, entry: Entry) -> None:
    peer, case = entry
    if (state := PEERS[peer].state(case.mode)) != "ok":
        pytest.skip(state)
    torch.compiler.reset()
    loss = PEERS[peer].build(case.mode)
    gate.check(peer, loss, case)
    step = Step(loss, leaves_of(make_inputs(case)))
    benchmark.group = f"N = {case.N}"
    rounds, calls = (3, 1) if case.N == MAIN else (10, max(1, 2048 // case.N))
    benchmark.pedantic(step.both, rounds=rounds, iterations=calls, warmup_rounds=1)


@pytest.mark.parametrize("bar", bars(), ids=lambda bar: bar.slug)
def test_bar(measured: Measured, bar: Bar) -> None:
    group = bar.top[0]
    rows = measured(group, ROUNDS.get(group, 5))
    value = bar.value(rows, robust=True)
    if value is None:
        pytest.skip("torch.compile needs a C++ compiler")
    slack = TIME_SLACK if bar.measure == "time" else MEMORY_SLACK
    assert value <= slack * bar.limit


def test_bfloat16_is_checked_without_instructions(measured: Measured) -> None:
    """The bfloat16 path must be right (and is timed) on CPUs that have no bar for it, too."""
    rows = measured("bfloat16", 5)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}


def test_memory_estimate(measured: Measured) -> None:
    """`memory_estimate` is what the allocator hands out, within 10 %."""
    rows = measured(f"one-sided-{MAIN}", 5)
    ours = [row for row in rows if row["estimate_mib"] is not None]
    assert ours
    for row in ours:
        assert abs(row["allocated_mib"] / row["estimate_mib"] - 1.0) < 0.1, row


def test_gate_rejects_a_wrong_peer() -> None:
    """A gate that cannot fail proves nothing."""
    case = Case("one-sided", 256, 512)
    loss = PEERS["ours"].build(case.mode)
    gate.check("ours", loss, case)
    with pytest.raises(gate.GateError, match="radius"):
        gate.check("ours", lambda a, t, r, *rest: loss(a, t, 1.01 * r, *rest), case)
