"""Writing keys and values to the paged KV cache, in Triton.

`kv_write` is the entry point. May import `layouts` and `gpu.common`; never `gpu.matmul` or `gpu.attention`.
"""
