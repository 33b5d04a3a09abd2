"""Writes the keys and values of new tokens to the paged caches: the entry point, and the kernel for plain caches.

One program writes one token: cache[slot] = row, for its key and its value. A slot of -1 is padding (unused rows of a CUDA
graph) and is skipped. In plain torch (`reference.kv_write`) that takes a boolean index, and thus a synchronization.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.gpu.kv.kv_write_quantized import is_quantized, write_quantized
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
    """Grid (T,): writes one token's key and value."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        _copy(key + token * key_stride, key_stride_head, key_cache + slot * (HEADS * D), HEADS, HEADS_PAD, D, D_PAD)
        _copy(value + token * value_stride, value_stride_head, value_cache + slot * (HEADS * DV), HEADS, HEADS_PAD, DV, DV_PAD)


def kv_write(key: Tensor, value: Tensor, key_cache: Cache, value_cache: Cache, slot_mapping: Tensor) -> None:
    """Write new keys and values to their slots, in place; the same as `reference.kv_write`.

    Args:
        key: [T, Hkv, D], any strides of rows and heads (it may be a slice of a fused projection).
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
    if not isinstance(key_cache, Tensor) or not isinstance(value_cache, Tensor) or is_quantized(key_cache):
        write_quantized(key, key_cache, slot_mapping)
        write_quantized(value, value_cache, slot_mapping)
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
