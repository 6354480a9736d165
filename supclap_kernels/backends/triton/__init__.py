"""The Triton backend: tile kernels, or panels between Triton epilogues."""
