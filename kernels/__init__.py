"""Compute kernels of the runtime. Empty until the runtime lands: quantization itself runs on plain torch."""
