"""Nothing depends on PyTorch's default device and dtype, or on autocast, and no call fails there.

In processes of their own: memory on another device is a segmentation fault.
"""

import pytest
import rank_settings as settings
from ranks import run
from surroundings import calls

import supclap_kernels as sk


@pytest.mark.parametrize("world", [1, 2])
def test_no_call_depends_on_settings(world):
    for changed in run(world, settings.every_call):
        assert not changed


def test_every_public_name_is_called():
    named = " ".join(calls())
    results = {"ForceDecomposition", "SVRStats"}
    assert not [name for name in set(sk.__all__) - results if name not in named]
