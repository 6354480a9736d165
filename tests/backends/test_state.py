"""Python, C++ and the specification agree on constants and layouts."""

import pytest

from supclap_kernels import gradients, native, options, reference
from supclap_kernels.backends import state

compiled, reason = native.load()
pytestmark = pytest.mark.skipif(compiled is None, reason=reason)


def test_constants_are_those_of_csrc():
    constants = {
        "HIDDEN": state.HIDDEN,
        "EPS": reference.EPS,
        **{name: getattr(gradients, name) for name in ("LITERAL_C", "LITERAL_GAP")},
        **{name: getattr(gradients, name) for name in ("LITERAL_LENGTH", "MIN_LENGTH", "MIN_NORM")},
    }
    assert native.module().CONSTANTS == constants


def test_every_name_of_the_layout_is_that_of_csrc():
    names = {name for name in vars(state) if name.isupper()} - {"HIDDEN"}
    layout = {name: getattr(state, name) for name in names}
    modes = {name: getattr(options, name) for name in ("PLAIN", "ONE_SIDED", "SHARED", "MIRROR")}
    assert native.module().LAYOUT == layout | modes


def test_triton_takes_the_same():
    pytest.importorskip("triton")
    from supclap_kernels.backends.triton import tile

    shared = {name for name in vars(state) if name.isupper()} & set(vars(tile))
    assert len(shared) >= 20
    for name in shared:
        assert getattr(tile, name).value == getattr(state, name), name
