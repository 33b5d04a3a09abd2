"""The paged KV cache. This room knows nothing of models or sampling.

- Which sequence holds which blocks: `block_manager`, `block_pool`, `prefix_cache`, `eviction`.
- How numbers are stored: `dtypes` lists the choices of `--kv-dtype`, each of which is a `dtype_*` file; `cache_format`,
  `cache`, `tail_pages`.
- How large the cache is: `options`, `sizing`.
- Where blocks go that leave the device: `offload`, `host_tier`, `disk_tier`.

Imports only `runtime.core`, `kernels` and `utils`.
"""
