"""Paged attention and cache writes on a CPU: by native kernels if there is a C compiler, else by the reference.

The native kernels compute in float32 for all types of queries and caches. A query's result depends neither on the other rows
of the call nor on the number of threads.
"""

from ctypes import byref, c_int64, c_void_p

import torch
from torch import Tensor

from quantkit.kernels import reference
from quantkit.kernels.cpu import library, structs
from quantkit.kernels.layouts.quantized_kv import Cache


def kv_write(key: Tensor, value: Tensor, key_cache: Cache, value_cache: Cache, slot_mapping: Tensor) -> None:
    """What `reference.kv_write` does, natively if possible; tail pages must then be bfloat16."""
    lib = library.load()
    if lib is None:
        return reference.kv_write(key, value, key_cache, value_cache, slot_mapping)
    slots = slot_mapping.long().contiguous()
    keys = key.float().contiguous()
    values = value.float().contiguous()
    _, heads, dim = key.shape
    assert key_cache.shape[2:] == (heads, dim), (key.shape, key_cache.shape)
    assert value_cache.shape[2:] == value.shape[1:], (value.shape, value_cache.shape)
    config = structs.AttentionConfig(None, heads, heads, dim, value.shape[2], 0, structs.cache_type(key_cache), 0.0, 0.0)
    paged = structs.PagedBatch(None, None, None, structs.tail_page_ids(key_cache), 0, 0, key_cache.shape[1], 0)
    lib.quantkit_kv_write(
        byref(config),
        byref(paged),
        byref(structs.kv_arrays(key_cache)),
        byref(structs.kv_arrays(value_cache)),
        c_void_p(slots.data_ptr()),
        c_int64(len(slots)),
        c_void_p(keys.data_ptr()),
        c_void_p(values.data_ptr()),
        library.threads(),
    )
    return None


def paged_attention(
    query: Tensor,
    key_cache: Cache,
    value_cache: Cache,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    draft: bool = False,
) -> Tensor:
    """What `reference.paged_attention` computes, natively if possible: [T, Hq, Dv] in the query's dtype, computed in
    float32.
    """
    lib = library.load()
    if lib is None:
        return reference.paged_attention(
            query,
            key_cache,
            value_cache,
            block_table,
            query_start,
            seq_lens,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            draft=draft,
        )
    heads, dim = query.shape[1:]
    _, block_size, kv_heads, value_dim = value_cache.shape
    wide, out = query.float().contiguous(), torch.empty(len(query), heads, value_dim)
    table, starts, lengths = (tensor.int().contiguous() for tensor in (block_table, query_start, seq_lens))
    sinks = None if sinks is None else sinks.float().contiguous()
    config = structs.AttentionConfig(
        structs.address(sinks), heads, kv_heads, dim, value_dim, window, structs.cache_type(key_cache), scale, softcap
    )
    paged = structs.PagedBatch(
        structs.address(table),
        structs.address(starts),
        structs.address(lengths),
        structs.tail_page_ids(key_cache),
        len(lengths),
        table.shape[1],
        block_size,
        draft,
    )
    lib.quantkit_paged_attention(
        byref(config),
        byref(paged),
        c_void_p(structs.address(wide)),
        byref(structs.kv_arrays(key_cache)),
        byref(structs.kv_arrays(value_cache)),
        c_void_p(structs.address(out)),
        library.threads(),
    )
    return out.to(query.dtype)
