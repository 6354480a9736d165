"""The kernels, one module for each place they run."""
