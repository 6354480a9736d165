"""The kernels, a folder for each family, and what they share."""
