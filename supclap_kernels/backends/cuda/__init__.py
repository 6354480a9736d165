"""The CUDA backend: one launch, the sweeps of Hopper, or panels between CUDA epilogues."""
