"""CPU kernels in C (csrc/), compiled on first use and called through ctypes; without a compiler, torch."""
