"""Store the keys and values of new tokens in the paged caches.

One program moves one token: cache[slot] = row for its key and its value. A slot of -1 is padding (a CUDA graph's unused
rows) and is skipped. Plain torch (`reference.kv_write`) needs a boolean index, hence a synchronisation, for that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.gpu.kv.kv_write_quantized import quantizes, write_stored
from quantkit.kernels.layouts.quantized_kv import Cache


@triton.jit
def _copy(source, stride_head, target, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    heads = tl.arange(0, HEADS_PAD)[:, None]
    dims = tl.arange(0, D_PAD)[None, :]
    inside = (heads < HEADS) & (dims < D)
    tl.store(target + heads * D + dims, tl.load(source + heads * stride_head + dims, mask=inside), mask=inside)


@triton.jit
def kv_write_kernel(  # type: ignore[no-untyped-def]
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_stride,
    key_stride_head,
    value_stride,
    value_stride_head,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Grid (T,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        _copy(key + token * key_stride, key_stride_head, key_cache + slot * (HEADS * D), HEADS, HEADS_PAD, D, D_PAD)
        _copy(value + token * value_stride, value_stride_head, value_cache + slot * (HEADS * DV), HEADS, HEADS_PAD, DV, DV_PAD)


def kv_write(key: Tensor, value: Tensor, key_cache: Cache, value_cache: Cache, slot_mapping: Tensor) -> None:
    """Store new keys and values in their slots, in place; the same as `reference.kv_write`.

    Args:
        key: [T, Hkv, D], rows and heads at any stride (a slice of a fused projection).
        value: [T, Hkv, Dv], likewise.
        key_cache: [num_blocks, block_size, Hkv, D], contiguous, in key's dtype or float8 e4m3; or a `QuantizedKV`.
        value_cache: [num_blocks, block_size, Hkv, Dv], likewise.
        slot_mapping: int64 [T], block * block_size + offset of every token; -1 for padding.
    """
    tokens, heads, dim = key.shape
    value_dim = value.shape[2]
    assert value.shape[:2] == (tokens, heads), (key.shape, value.shape)
    for new, cache in ((key, key_cache), (value, value_cache)):
        assert cache.shape[2:] == new.shape[1:], (new.shape, cache.shape)
        assert new.stride(2) == 1
    assert slot_mapping.shape == (tokens,)
    assert slot_mapping.dtype == torch.int64
    if tokens == 0:
        return
    if not isinstance(key_cache, Tensor) or not isinstance(value_cache, Tensor) or quantizes(key_cache):
        write_stored(key, key_cache, slot_mapping)
        write_stored(value, value_cache, slot_mapping)
        return
    for new, plain in ((key, key_cache), (value, value_cache)):
        assert plain.dtype == new.dtype, (new.dtype, plain.dtype)
        assert plain.is_contiguous()
    kv_write_kernel[(tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        HEADS=heads,
        HEADS_PAD=triton.next_power_of_2(heads),
        D=dim,
        D_PAD=triton.next_power_of_2(dim),
        DV=value_dim,
        DV_PAD=triton.next_power_of_2(value_dim),
    )
