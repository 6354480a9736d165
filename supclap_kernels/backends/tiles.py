"""Every tile size, with its reason."""

CPU_TILE = 512
"""Side of a tile of the Gram matrix on a CPU: float32 products of 512 x 512 x 512 reach the
library's full rate, and the three blocks of a tile (3 MiB) stay in the last-level cache between
product and epilogue."""

CPU_TILE_MINIMUM = 64
"""Smallest side, whatever the workspace: below it the products lose more than half of their rate.
"""
