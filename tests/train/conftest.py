"""What the trainer's tests share."""

import pytest
from clips import write_clips


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Nine clips with two captions each."""
    return write_clips(tmp_path_factory.mktemp("clips"))
