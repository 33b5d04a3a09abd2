"""Paged attention for decode and prefill, over plain and over quantized KV caches, in Triton."""
