"""What kernels.py and tune.py use of the inside of the package: its tile sizes."""

import torch

from supclap_kernels.backends import tile_sizes
from supclap_kernels.backends.panel import Layout, Tiling

Blocks = tile_sizes.Blocks


def panel_elements(N: int, grams: int) -> int:
    """Of all panels together, on a GPU."""
    tiling = Tiling(tile_sizes.GPU_TILE, tile_sizes.GPU_PAD, tile_sizes.GPU_PAD, 1)
    return Layout.choose(N, grams, tiling, 2**60).panel_elements


def architecture() -> int:
    """Of the GPU as Triton's kernels are chosen for it: 90 for 9.0."""
    from supclap_kernels.backends.triton import call

    return call.architecture(torch.device("cuda"))


def use_blocks(blocks: dict[str, Blocks]) -> None:
    """From now on the kernels take their blocks from here, by the keys of SUPCLAP_TILES."""
    tile_sizes.tuned = lambda: blocks
