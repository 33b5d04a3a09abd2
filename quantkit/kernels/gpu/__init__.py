"""Triton kernels, their launchers and their tile sizes."""
