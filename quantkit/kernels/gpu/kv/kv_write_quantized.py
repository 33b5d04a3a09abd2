"""Writes to quantized caches: e4m3 and int8 tokens at once; int4 tokens to tail pages, which are quantized when they are
full.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.gpu.common import computes_in_float32, round_half_even
from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV


@triton.jit
def _codes(x, scale, minimum, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 codes of x; scale and minimum are float32."""
    code = round_half_even((x - minimum) / tl.where(scale > 0, scale, 1.0))
    return tl.where(scale > 0, tl.minimum(tl.maximum(code, 0.0), LEVELS), 0.0)


@triton.jit
def to_e4m3(x):  # type: ignore[no-untyped-def]
    """float32 numbers as e4m3 bytes, rounded to nearest even and saturating at 448. NaN becomes 448."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)
    normal = (size - 0x3C000000 + 0x7FFFF + ((size >> 20) & 1)) >> 20
    # Below 2^-6: added to 2^14, the number's multiple of 2^-9 is in the lowest bits of the sum.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def write_tokens_kernel(  # type: ignore[no-untyped-def]
    new,
    data,
    params,
    slot_mapping,
    stride,
    stride_head,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Grid (T,): writes all heads of one token as bytes: int8 codes with parameters, or e4m3 if params is None."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        heads, dims = tl.arange(0, HEADS_PAD), tl.arange(0, D_PAD)
        inside = (heads < HEADS)[:, None] & (dims < D)[None, :]
        x = tl.load(new + token * stride + heads[:, None] * stride_head + dims[None, :], mask=inside, other=0.0).to(tl.float32)
        row = slot * HEADS + heads
        if params is None:
            code = to_e4m3(x)
        else:
            low = tl.min(tl.where(inside, x, float("inf")), 1)
            high = tl.max(tl.where(inside, x, float("-inf")), 1)
            low, high = tl.where(heads < HEADS, low, 0.0), tl.where(heads < HEADS, high, 0.0)
            scale, minimum = ((high - low) / 255.0).to(tl.float16), low.to(tl.float16)
            tl.store(params + row * 2, scale, mask=heads < HEADS)
            tl.store(params + row * 2 + 1, minimum, mask=heads < HEADS)
            code = _codes(x, scale.to(tl.float32)[:, None], minimum.to(tl.float32)[:, None], 255.0).to(tl.uint8)
        tl.store(data + row[:, None] * D + dims[None, :], code, mask=inside)


@triton.jit
def write_tail_kernel(  # type: ignore[no-untyped-def]
    new,
    tail_pages,
    tail_page_ids,
    slot_mapping,
    stride,
    stride_head,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Grid (T,): writes one token to its tail page."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        heads, dims = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, D_PAD)[None, :]
        inside = (heads < HEADS) & (dims < D)
        page = tl.load(tail_page_ids + slot // BLOCK_SIZE).to(tl.int64)
        row = (page * BLOCK_SIZE + slot % BLOCK_SIZE) * HEADS + heads
        x = tl.load(new + token * stride + heads * stride_head + dims, mask=inside)
        tl.store(tail_pages + row * D + dims, x.to(tail_pages.dtype.element_ty), mask=inside)


@triton.jit
def _store_codes(low, high, minimum_low, minimum_high, scale_low, scale_high, target, lower, inside):  # type: ignore[no-untyped-def]
    """Store the codes of two tiles, packed into bytes; and the lower 4 bits, unless `lower` is None."""
    first, second = _codes(low, scale_low, minimum_low, 15.0), _codes(high, scale_high, minimum_high, 15.0)
    tl.store(target, first.to(tl.uint8) | (second.to(tl.uint8) << 4), mask=inside)
    if lower is not None:
        residual = _residual(low, first, scale_low, minimum_low) | (_residual(high, second, scale_high, minimum_high) << 4)
        tl.store(lower, residual, mask=inside)


@triton.jit
def _residual(x, code, scale, minimum):  # type: ignore[no-untyped-def]
    step = scale / 16.0
    residual = round_half_even((x - (scale * code + minimum)) / tl.where(step > 0, step, 1.0))
    return (tl.where(step > 0, tl.minimum(tl.maximum(residual, -8.0), 7.0), 0.0) + 8.0).to(tl.uint8)


@triton.jit
def quantize_pages_kernel(  # type: ignore[no-untyped-def]
    data,
    params,
    lower,
    tail_pages,
    tail_page_ids,
    slot_mapping,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
):
    """Grid (T, HEADS): if the token has the last slot of a page, quantizes one head of that page."""
    slot, head = tl.load(slot_mapping + tl.program_id(0).to(tl.int64)), tl.program_id(1)
    half: tl.constexpr = D // 2
    if slot >= 0 and slot % BLOCK_SIZE == BLOCK_SIZE - 1:
        block = slot // BLOCK_SIZE
        tokens, dims = tl.arange(0, BLOCK_SIZE), tl.arange(0, HALF_PAD)
        inside = (tokens >= 0)[:, None] & (dims < half)[None, :]
        page = tl.load(tail_page_ids + block).to(tl.int64)
        source = tail_pages + ((page * BLOCK_SIZE + tokens) * HEADS + head)[:, None] * D + dims[None, :]
        left = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        rows = (block * BLOCK_SIZE + tokens) * HEADS + head
        target = rows[:, None] * half + dims[None, :]
        residual = None if lower is None else lower + target
        if BY_CHANNEL:
            at = params + (block * HEADS + head) * (2 * D) + dims
            minimum_left, minimum_right = tl.min(left, 0).to(tl.float16), tl.min(right, 0).to(tl.float16)
            scale_left = ((tl.max(left, 0) - tl.min(left, 0)) / 15.0).to(tl.float16)
            scale_right = ((tl.max(right, 0) - tl.min(right, 0)) / 15.0).to(tl.float16)
            valid = dims < half
            tl.store(at, scale_left, mask=valid)
            tl.store(at + half, scale_right, mask=valid)
            tl.store(at + D, minimum_left, mask=valid)
            tl.store(at + D + half, minimum_right, mask=valid)
            _store_codes(
                left, right, minimum_left.to(tl.float32)[None, :], minimum_right.to(tl.float32)[None, :],
                scale_left.to(tl.float32)[None, :], scale_right.to(tl.float32)[None, :], data + target, residual, inside,
            )  # fmt: skip
        else:
            least = tl.min(tl.where(inside, tl.minimum(left, right), float("inf")), 1)
            most = tl.max(tl.where(inside, tl.maximum(left, right), float("-inf")), 1)
            scale, minimum = ((most - least) / 15.0).to(tl.float16), least.to(tl.float16)
            tl.store(params + rows * 2, scale)
            tl.store(params + rows * 2 + 1, minimum)
            wide_scale, wide_minimum = scale.to(tl.float32)[:, None], minimum.to(tl.float32)[:, None]
            _store_codes(left, right, wide_minimum, wide_minimum, wide_scale, wide_scale, data + target, residual, inside)


def write_quantized(new: Tensor, cache: Cache, slot_mapping: Tensor) -> None:
    """Write keys or values [T, H, D] to a `QuantizedKV` or an e4m3 cache, as `reference.kv_write` does."""
    tokens, heads, dim = new.shape
    heads_pad, dim_pad = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    if computes_in_float32(new):
        new = new.float()
    if isinstance(cache, Tensor) or cache.tail_pages is None:
        write_tokens_kernel[(tokens,)](
            new,
            cache.view(torch.uint8) if isinstance(cache, Tensor) else cache.codes,
            None if isinstance(cache, Tensor) else cache.params,
            slot_mapping,
            new.stride(0),
            new.stride(1),
            HEADS=heads,
            HEADS_PAD=heads_pad,
            D=dim,
            D_PAD=dim_pad,
        )
        return
    block_size = cache.tail_pages.shape[1]
    assert block_size & (block_size - 1) == 0, block_size
    write_tail_kernel[(tokens,)](
        new,
        cache.tail_pages,
        cache.tail_page_ids,
        slot_mapping,
        new.stride(0),
        new.stride(1),
        BLOCK_SIZE=block_size,
        HEADS=heads,
        HEADS_PAD=heads_pad,
        D=dim,
        D_PAD=dim_pad,
    )
    quantize_pages_kernel[(tokens, heads)](
        cache.codes,
        cache.params,
        cache.lower,
        cache.tail_pages,
        cache.tail_page_ids,
        slot_mapping,
        BLOCK_SIZE=block_size,
        HEADS=heads,
        D=dim,
        HALF_PAD=triton.next_power_of_2(dim // 2),
        BY_CHANNEL=cache.by_channel,
        num_warps=8,
    )


def is_quantized(cache: Cache) -> bool:
    """Whether tokens are written to this cache by `write_quantized`."""
    return isinstance(cache, QuantizedKV) or cache.dtype == torch.float8_e4m3fn
