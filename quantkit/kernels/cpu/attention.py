"""Paged attention and cache writes on a CPU: native kernels where a C compiler is found, the oracles elsewhere.

Native kernels compute in float32 whatever the types of queries and caches are; a query's result does not depend on the other
rows of the call, nor on the number of threads.
"""

from ctypes import byref, c_int64, c_void_p

import torch
from torch import Tensor

from quantkit.kernels import reference
from quantkit.kernels.cpu import library, structs
from quantkit.kernels.layouts.quantized_kv import Cache


def kv_write(key: Tensor, value: Tensor, key_cache: Cache, value_cache: Cache, slot_mapping: Tensor) -> None:
    """`reference.kv_write`, natively where possible; open pages are bfloat16 then."""
    lib = library.load()
    if lib is None:
        return reference.kv_write(key, value, key_cache, value_cache, slot_mapping)
    slots, keys, values = slot_mapping.long().contiguous(), key.float().contiguous(), value.float().contiguous()
    _, heads, dim = key.shape
    assert key_cache.shape[2:] == (heads, dim), (key.shape, key_cache.shape)
    assert value_cache.shape[2:] == value.shape[1:], (value.shape, value_cache.shape)
    shape = structs.Heads(None, heads, heads, dim, value.shape[2], 0, structs.kind(key_cache), 0.0, 0.0)
    pages = structs.Pages(None, None, None, structs.tail_page_ids(key_cache), 0, 0, key_cache.shape[1], 0)
    stores = (byref(structs.store(cache)) for cache in (key_cache, value_cache))
    rows = c_void_p(keys.data_ptr()), c_void_p(values.data_ptr())
    where = c_void_p(slots.data_ptr()), c_int64(len(slots))
    lib.quantkit_kv_write(byref(shape), byref(pages), *stores, *where, *rows, library.threads())
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
    """`reference.paged_attention`, natively where possible: [T, Hq, Dv] in the query's dtype, computed in float32."""
    lib = library.load()
    if lib is None:
        batch = (query, key_cache, value_cache, block_table, query_start, seq_lens)
        return reference.paged_attention(*batch, scale=scale, window=window, softcap=softcap, sinks=sinks, draft=draft)
    heads, dim = query.shape[1:]
    _, block_size, kv_heads, value_dim = value_cache.shape
    wide, out = query.float().contiguous(), torch.empty(len(query), heads, value_dim)
    table, starts, lengths = (tensor.int().contiguous() for tensor in (block_table, query_start, seq_lens))
    sinks = None if sinks is None else sinks.float().contiguous()
    kind = structs.kind(key_cache)
    shape = structs.Heads(structs.address(sinks), heads, kv_heads, dim, value_dim, window, kind, scale, softcap)
    addresses = (structs.address(tensor) for tensor in (table, starts, lengths))
    pages = structs.Pages(*addresses, structs.tail_page_ids(key_cache), len(lengths), table.shape[1], block_size, draft)
    stores = (byref(structs.store(cache)) for cache in (key_cache, value_cache))
    pointers = c_void_p(structs.address(wide)), *stores, c_void_p(structs.address(out))
    lib.quantkit_paged_attention(byref(shape), byref(pages), *pointers, library.threads())
    return out.to(query.dtype)
