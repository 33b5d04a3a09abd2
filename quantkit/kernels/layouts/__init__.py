"""How quantized weights and KV caches lie in memory: documents and converters, shared by the CPU and the GPU kernels."""
