"""Every tile size, with its reason."""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

CPU_TILE = 512
"""Side of a tile of the Gram matrix on a CPU: float32 products of 512 x 512 x 512 reach the
library's full rate, and the three blocks of a tile (3 MiB) stay in the last-level cache between
product and epilogue."""

CPU_TILE_MINIMUM = 64
"""Smallest side, whatever the workspace: below it the products lose more than half of their rate.
"""

CPU_SMALL = 256
"""Largest batch that is one native call on a CPU."""

GPU_TILE = 4096
"""Largest side of a tile pair on a GPU: library products of 4096 x 4096 x D fill every
multiprocessor several times over; larger tiles would only cost memory."""

GPU_PAD = 128
"""Blocks of a panel are padded to whole blocks of the kernels, so that no access needs a mask:
a mask would break up its 16 bytes. Every BLOCK_I and BLOCK_J divides it."""

OPERAND_COLUMNS = 64
"""Operands have a multiple of this many columns, the largest BLOCK_D: loops over D need no mask."""


def operand_width(D: int) -> int:
    return -(-D // OPERAND_COLUMNS) * OPERAND_COLUMNS


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
ROW_ELEMENTS = 2**22
"""Elements of a block of rows in the O(N D) work: at most four temporaries of 16 MiB are alive at a
time, and to read or write one takes a GPU about as long as a launch, so smaller blocks would be
slower."""
MERGE_SLOTS, MERGE_ROWS = 16, 32
"""Partial results of a row that a program which merges them reads at once, and its rows."""
LITERAL_ROWS, LITERAL_COLUMNS, LITERAL_DEPTH, LITERAL_CHUNK = 16, 32, 32, 128
"""A program's literal rows; the compared rows and the columns it takes at a time; columns of the
gradient."""
LITERAL_SPLIT, LITERAL_PARTS = 512, 128
"""Compared rows of a program at least, and how many programs may leave partial gradients."""


def tile_blocks(
    weights: bool, grams: int, infonce: bool, ieee: bool, itemsize: int, arch: int
) -> Blocks:
    """Blocks of the tile kernels: the largest that compile with few or no spills (`bench.aot`).

    Larger tiles read their operands less often; more accumulators (2 + grams) and the epilogue of
    sweep 2 leave fewer registers for them. `ieee`: float32 on the CUDA cores.
    """
    if ieee and arch // 10 == 9:
        return Blocks(64, 32 if grams == 2 else 64, 32, warps=8, stages=2)
    if ieee:  # the compiler spills one size earlier
        return Blocks(64, 32, 16, warps=8, stages=2)
    roomy = arch // 10 in (9, 10)  # over 200 KiB of shared memory; from 99 on the others
    depth = (128 if roomy else 64) // itemsize
    if weights and grams == 2 and not infonce:  # one sweep does the work of both
        return Blocks(128, 32, 64 // itemsize, warps=8, stages=3, parts=2)
    if weights and grams == 2 and itemsize == 4 and arch // 10 == 10:
        return Blocks(64, 32, 16, warps=8, stages=3, parts=4)
    if grams == 0 and infonce and roomy:
        return Blocks(128, 128, depth, warps=8, stages=3, parts=4)
    return Blocks(128, 64, depth, warps=8, stages=3, parts=2 if roomy and not weights else 4)


def tuned() -> dict[str, Blocks]:
    """What `python -m bench.tune` found faster on a GPU: the file that SUPCLAP_TILES names, if any.

    {"kernel grams infonce dtype arch": [i, j, d, warps, stages, parts]}
    """
    return read_tuned(os.environ.get("SUPCLAP_TILES", ""))


@functools.cache
def read_tuned(path: str) -> dict[str, Blocks]:
    if not path:
        return {}
    blocks = {key: Blocks(*values) for key, values in json.loads(Path(path).read_text()).items()}
    for key, block in blocks.items():
        if GPU_PAD % block.i or GPU_PAD % block.j or OPERAND_COLUMNS % max(block.d, 1):
            raise ValueError(
                f"SUPCLAP_TILES={path}: {key}: i and j must divide {GPU_PAD}, and d "
                f"{OPERAND_COLUMNS}; got {list(block)}"
            )
    return blocks


SPILLS = {
    "tile_backward MODE=3": "128 x 64 reads a third less than 64 x 64, which does not spill",
    "tile_backward MODE=2": "4 registers",
    "tile_forward MODE=3": "1 register, with statistics",
    "panel_weights MODE=3": "float32 SigLIP: 7 registers; fewer columns cost the 128-bit stores",
    "literal_columns MODE=2": "5 registers, outside its loop",
    "literal_gradient": "2 registers: 4 warps of 128 keep two programs on a multiprocessor",
    "finish_literal": "2 registers, in float32 with every option",
}
"""Kernels that may spill up to 400 bytes outside their product loop, by name and constants, with
the reason. Once a GPU has measured, only winners stay."""
