"""Compute kernels. `reference` holds the plain torch twin of every kernel; `layouts` the memory layouts; `gpu` Triton kernels;
`cpu` C kernels. Imports torch and triton only, and nothing else of quantkit but `utils`.
"""
