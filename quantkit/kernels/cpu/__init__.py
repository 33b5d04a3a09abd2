"""CPU kernels in C (csrc/), compiled on first use and called through ctypes; without a C compiler, torch computes instead.

May import `kernels.layouts`, `kernels.reference` and `utils`; never `kernels.gpu`.
"""
