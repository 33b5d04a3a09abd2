"""Compute kernels: one operation a file, each with its torch oracle in `reference`."""
