"""The GPU backends against the specification: their kernels on CPU tensors, in Triton's
interpreter. Inputs and working memory lie inside NaN, and the borders are looked at afterwards.

Run in a process with TRITON_INTERPRET=1 (tests/test_triton.py starts it).
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gpu_suite import MODES, Guard, accepted, suite, verify

from supclap_kernels.backends import gpu_call, gpu_far, gpu_triton, tiles
from supclap_kernels.testing import Case, make_inputs


def sizes(monkeypatch: pytest.MonkeyPatch, pad: int, rows: int, columns: int, split: int) -> None:
    monkeypatch.setattr(tiles, "GPU_PAD", pad)
    monkeypatch.setattr(tiles, "ROWS", rows)
    monkeypatch.setitem(gpu_triton.ROW_GRID, "BLOCK_N", rows)
    monkeypatch.setattr(gpu_far, "BLOCK_J", columns)
    monkeypatch.setattr(tiles, "FAR_SPLIT", split)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped tiles, and few programs of the other kernels, which is faster."""
    sizes(monkeypatch, tiles.GPU_PAD, rows=64, columns=64, split=tiles.FAR_SPLIT)


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[Guard]:
    guard = Guard()
    empty = lambda self, *shape, dtype=torch.float32: guard.empty(shape, dtype)  # noqa: E731
    monkeypatch.setattr(gpu_call.Call, "new_empty", empty)
    zeros = lambda self, *shape: guard.empty(shape).zero_()  # noqa: E731
    monkeypatch.setattr(gpu_call.Call, "new_zeros", zeros)
    yield guard
    assert guard.intact()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, programs, slots, parts and splits at a small N."""
    sizes(monkeypatch, pad=64, rows=32, columns=32, split=32)
    monkeypatch.setattr(tiles, "PANEL_STATISTICS", tiles.Blocks(64, 32))
    monkeypatch.setattr(tiles, "PANEL_WEIGHTS", tiles.Blocks(32, 64))
    monkeypatch.setattr(tiles, "tile_blocks", lambda *_: tiles.Blocks(32, 64, 32, parts=2))
    monkeypatch.setattr(tiles, "FAR_PARTS", 3)
    monkeypatch.setattr(tiles, "VECTOR", 64)


SUITE = suite("panel", "triton")


def test_the_suite_is_large_enough():
    assert len(SUITE) >= 400


@pytest.mark.parametrize("backend, case, small", SUITE)
def test_options(backend, case, small, guard, request):
    request.getfixturevalue("small_tiles" if small else "large_tiles")
    verify(case, guard, backend, workspace=case.options["workspace"])


@pytest.mark.parametrize("mode", MODES[1:4] + MODES[5:], ids=str)
@pytest.mark.parametrize("close", [[5], list(range(0, 120, 6))], ids=("one", "twenty"))
def test_few_far_rows_are_split_among_programs(mode, close, backend, guard, small_tiles):
    options = {**mode, "renormalize": len(close) == 1}
    case = Case(N=129, D=20, options=options)
    inputs = make_inputs(case)
    inputs.audio[close] = inputs.text[close] + 0.02 * inputs.audio[close].flip(1)
    accepted(case, inputs, backend)


@pytest.mark.parametrize("length, scale, upstream", [(1.0, 1e-3, 1e7), (0.02, 2500.0, 0.1)])
def test_float16_weights_stay_in_range(length, scale, upstream, backend, guard, large_tiles):
    """Weights beyond float16 in gradients that are not: large upstream gradients of a small scale,
    and short rows, whose support vectors are divided by their length."""
    case = Case(N=60, D=16, dtype=torch.float16, scale=scale,
                options={"renormalize": True, "reduction": "sum"})  # fmt: skip
    plain = make_inputs(case)
    moved = {name: (length * getattr(plain, name).float()).half() for name in ("audio", "text")}
    inputs = replace(plain, **moved, radius=length * plain.radius, upstream=torch.tensor(upstream))
    accepted(case, inputs, backend)
