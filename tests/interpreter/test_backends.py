"""The GPU backends against the specification: their kernels on CPU tensors, in Triton's
interpreter. Inputs and working memory lie inside NaN, and the borders are looked at afterwards.

Run in a process with TRITON_INTERPRET=1 (tests/backends/test_triton.py starts it).
"""

from collections.abc import Iterator

import pytest
from covering import ALL
from gpu_suite import (
    CLOSE,
    RANGES,
    SUPPORT_MODES,
    Guard,
    check_float16_range,
    check_literal_rows,
    further_suite,
    guarded,
    suite,
    verify,
)

from supclap_kernels.backends import tile_sizes
from supclap_kernels.backends.triton import literal_rows


def sizes(monkeypatch: pytest.MonkeyPatch, pad: int, rows: int, columns: int, split: int) -> None:
    monkeypatch.setattr(tile_sizes, "GPU_PAD", pad)
    monkeypatch.setattr(tile_sizes, "ROW_ELEMENTS", rows * tile_sizes.OPERAND_COLUMNS)
    monkeypatch.setattr(literal_rows, "BLOCK_J", columns)
    monkeypatch.setattr(tile_sizes, "LITERAL_SPLIT", split)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped tile_sizes, and few programs of the other kernels, which is faster."""
    sizes(monkeypatch, tile_sizes.GPU_PAD, rows=64, columns=64, split=tile_sizes.LITERAL_SPLIT)


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[Guard]:
    guard = guarded(monkeypatch)
    yield guard
    assert guard.intact()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tile_sizes, programs, slots, parts and splits at a small N."""
    sizes(monkeypatch, pad=64, rows=32, columns=32, split=32)
    monkeypatch.setattr(tile_sizes, "PANEL_STATISTICS", tile_sizes.Blocks(64, 32))
    monkeypatch.setattr(tile_sizes, "PANEL_WEIGHTS", tile_sizes.Blocks(32, 64))
    monkeypatch.setattr(
        tile_sizes, "tile_blocks", lambda *_: tile_sizes.Blocks(32, 64, 32, parts=2)
    )
    monkeypatch.setattr(tile_sizes, "LITERAL_PARTS", 3)
    monkeypatch.setattr(tile_sizes, "MERGE_SLOTS", 2)


SUITE = suite("panel", "triton")


def test_the_suite_is_large_enough():
    assert len(SUITE) >= (400 if ALL else 100)


@pytest.mark.parametrize("backend, case", further_suite("panel", "triton"))
def test_further_negatives(backend, case, guard, large_tiles):
    verify(case, guard, backend, workspace=case.options["workspace"])


@pytest.mark.parametrize("backend, case, small", SUITE)
def test_options(backend, case, small, guard, request):
    request.getfixturevalue("small_tiles" if small else "large_tiles")
    verify(case, guard, backend, workspace=case.options["workspace"])


@pytest.mark.parametrize("mode", SUPPORT_MODES, ids=str)
@pytest.mark.parametrize("close", CLOSE.values(), ids=CLOSE.keys())
def test_few_literal_rows_are_split_among_programs(mode, close, backend, guard, small_tiles):
    check_literal_rows(mode, close, backend)


@pytest.mark.parametrize("length, scale, upstream", RANGES)
def test_float16_weights_stay_in_range(length, scale, upstream, backend, guard, large_tiles):
    check_float16_range(length, scale, upstream, backend)
