"""Paged attention for decode and prefill, over plain and quantized KV caches, in Triton.

`paged_attention` is the entry point. May import `layouts`, `autotune` and `gpu.common`; never `gpu.matmul` or `gpu.kv`.
"""
