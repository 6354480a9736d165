"""Nothing depends on PyTorch's default device and dtype, or on autocast, and no call fails there.

In processes of their own: memory on another device is a segmentation fault.
"""

import sys
from pathlib import Path

import pytest
from surroundings import calls

import supclap_kernels as sk

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

import settings
from ranks import run


@pytest.mark.parametrize("world", [1, 2])
def test_no_call_depends_on_settings(world):
    for changed in run(world, settings.every_call):
        assert not changed


def test_every_public_name_is_called():
    named = " ".join(calls())
    results = {"ForceDecomposition", "SVRStats"}
    assert not [name for name in set(sk.__all__) - results if name not in named]
