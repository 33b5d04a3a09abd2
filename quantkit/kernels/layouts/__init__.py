"""Memory layouts that kernels and the runtime share: packed weights (`planes`) and the quantized KV cache (`quantized_kv`).

`kv_codec` reads and writes that cache in plain torch. May import torch only; never `gpu`, `cpu` or `reference`.
"""
