"""Every tile size, with its reason."""

from typing import NamedTuple

CPU_TILE = 512
"""Side of a tile of the Gram matrix on a CPU: float32 products of 512 x 512 x 512 reach the
library's full rate, and the three blocks of a tile (3 MiB) stay in the last-level cache between
product and epilogue."""

CPU_TILE_MINIMUM = 64
"""Smallest side, whatever the workspace: below it the products lose more than half of their rate.
"""

GPU_TILE = 4096
"""Largest side of a tile pair on a GPU: library products of 4096 x 4096 x D fill every
multiprocessor several times over; larger tiles would only cost memory."""

GPU_PAD = 128
"""Blocks of a panel are padded to whole blocks of the kernels, so that no access needs a mask:
a mask would break up its 16 bytes. Every BLOCK_I and BLOCK_J divides it."""

OPERAND_COLUMNS = 64
"""Operands have a multiple of this many columns, the largest BLOCK_D: loops over D need no mask."""


class Blocks(NamedTuple):
    """One configuration of a kernel."""

    i: int
    j: int
    d: int = 0
    warps: int = 4
    stages: int = 1
    parts: int = 1


PANEL_STATISTICS = Blocks(32, 128, warps=8)
PANEL_WEIGHTS = Blocks(16, 128, warps=4)
"""Epilogues of the panel engine: 128-bit loads and stores along a row of 128, and no spills."""
ROWS, ROW_COLUMNS = 8, 64
"""Rows of a program in the O(N D) kernels, and columns at a time."""
VECTOR = 256
"""Rows of a program in the O(N) kernels."""
FAR_ROWS, FAR_COLUMNS, FAR_CHUNK = 16, 32, 128
"""Far rows of a program, compared rows at a time, columns of the gradient."""
FAR_SPLIT, FAR_PARTS = 512, 128
"""Compared rows of a program at least, and how many programs may leave partial gradients."""


def tile_blocks(kind: str, itemsize: int, arch: int) -> Blocks:
    """Blocks of the tile kernels. `kind`: "ieee" (float32 on the CUDA cores) or "mma"."""
    if kind == "ieee":
        return Blocks(64, 64, 32, warps=8, stages=2)
    return Blocks(64, 64, 128 // itemsize if arch >= 90 else 64 // itemsize, warps=8, stages=3)
