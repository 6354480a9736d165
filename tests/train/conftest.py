"""What the trainer's tests share."""

import pytest
import torch
from clips import settings, write_clips


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Nine clips with two captions each."""
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def run(manifest, tmp_path_factory):
    """A run of four epochs on them."""
    from supclap.train import train

    torch.set_num_threads(1)
    options = {"epochs": 4, "batch_size": 9, "val": manifest, "svr": "bi-dynamic"}
    return train(settings(manifest, tmp_path_factory.mktemp("runs") / "run", **options))
