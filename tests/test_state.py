"""Python, C++ and the specification agree on constants and layouts."""

import pytest

from supclap_kernels import gradients, native, reference
from supclap_kernels.backends import state

compiled, reason = native.load()
pytestmark = pytest.mark.skipif(compiled is None, reason=reason)
NOT_NUMBERED = {"HIDDEN"}


def test_constants_are_those_of_csrc():
    constants = {
        "HIDDEN": state.HIDDEN,
        "EPS": reference.EPS,
        **{name: getattr(gradients, name) for name in ("LITERAL_C", "LITERAL_GAP")},
        **{name: getattr(gradients, name) for name in ("LITERAL_LENGTH", "MIN_LENGTH", "MIN_NORM")},
    }
    assert native.module().CONSTANTS == constants


def test_every_name_of_the_layout_is_that_of_csrc():
    names = {name for name in vars(state) if name.isupper()} - NOT_NUMBERED
    assert native.module().LAYOUT == {name: getattr(state, name) for name in names}


def test_triton_takes_the_same():
    pytest.importorskip("triton")
    from supclap_kernels.backends import triton_rows, triton_tiles

    shared = {name for name in vars(state) if name.isupper()} & set(vars(triton_tiles))
    assert len(shared) > 25
    for name in shared:
        assert getattr(triton_tiles, name).value == getattr(state, name), name
    assert triton_rows.EPS.value == reference.EPS
    for name in ("LITERAL_C", "LITERAL_GAP", "LITERAL_LENGTH", "MIN_LENGTH", "MIN_NORM"):
        assert getattr(triton_rows, name).value == getattr(gradients, name), name
