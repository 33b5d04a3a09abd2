"""The paged KV cache: who owns which block (block_manager, prefix_cache, eviction), how numbers are stored (dtypes, cache,
tail_pages), and where blocks go that leave it (offload, host_tier, disk_tier). Knows nothing of models or sampling.
"""
