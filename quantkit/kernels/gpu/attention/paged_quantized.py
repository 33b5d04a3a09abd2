"""Quantized caches in the paged kernels: tiles of codes become tiles of numbers, and are then scored like any other.

Where blocks are quantized as a whole, a row sees its own page in 16 bit and earlier ones quantized (see `kv_store`), so the
tokens are walked in two passes: over the quantized pages, hiding from each row what is not before its own page; then over
the open pages, hiding what is. Only the pages of the tile's own rows are in both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.gpu.attention.paged_tile import soften
from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV

#: Forms of a cache: numbers in the query's type, e4m3 bytes, codes with parameters a token, codes with parameters a page.
PLAIN, FP8, INT8, PAGES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


def cache_arguments(key_cache: Cache, value_cache: Cache, draft: bool) -> tuple[Tensor | None, ...]:
    """What kernels take of the caches, keys before values: data, params, lower planes, open pages, and the table of these.

    None for what they lack, or what a draft leaves out.
    """

    def parts(cache: Cache) -> tuple[Tensor | None, ...]:
        if isinstance(cache, Tensor):
            return (cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache), None, None, None
        return cache.codes, cache.params, None if draft else cache.lower, cache.tail_pages

    pairs = zip(parts(key_cache), parts(value_cache), strict=True)
    table = key_cache.tail_page_ids if isinstance(key_cache, QuantizedKV) else None
    return (*(part for pair in pairs for part in pair), table)


def form(cache: Cache) -> int:
    """Which form it has."""
    if isinstance(cache, QuantizedKV):
        return int((INT8 if cache.tail_pages is None else PAGES).value)
    return int((FP8 if cache.dtype == torch.float8_e4m3fn else PLAIN).value)


@triton.jit
def e4m3_to_half(code):  # type: ignore[no-untyped-def]
    """float16 of uint16 e4m3 codes: the bits moved, the exponent rebiased by 2^8, exactly. No GPU needs to know the type."""
    return (((code & 0x7F) << 7) | ((code & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _exactly(code, LESS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """code - LESS for uint16 codes below 256: 0x6400 with a code in its last bits is 1024 + code in float16."""
    return ((code | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + LESS)).to(DTYPE)


@triton.jit
def _codes(data, lower, row, dim, inside, D: tl.constexpr, FORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint16 tile; of 4+4 bit 16 upper + lower. row (of a token and head) runs along one dimension, dim along the other."""
    if FORM == PAGES:
        half: tl.constexpr = D // 2
        byte, shift = row * half + dim % half, (4 * (dim // half)).to(tl.uint16)
        code = (tl.load(data + byte, mask=inside, other=0).to(tl.uint16) >> shift) & 15
        if lower is not None:
            code = (code << 4) | ((tl.load(lower + byte, mask=inside, other=0).to(tl.uint16) >> shift) & 15)
    else:
        code = tl.load(data + row * D + dim, mask=inside, other=0).to(tl.uint16)
    return code


@triton.jit
def _token_params(params, lower, row, inside, MIDDLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """step and offset of tokens, float32, such that x = step * (code - MIDDLE) + offset."""
    step = tl.load(params + row * 2, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(params + row * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    if lower is not None:
        step *= 0.0625
        offset -= 8.0 * step
    return step, offset + MIDDLE * step


@triton.jit
def _channel_keys(code, params, lower, page, dim, inside, D: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys whose parameters belong to a channel of a page; for 16-bit queries in float16, which is as fine as they are."""
    scale = tl.load(params + page * (2 * D) + dim, mask=inside, other=0.0)
    minimum = tl.load(params + page * (2 * D) + D + dim, mask=inside, other=0.0)
    if tl.float32 == DTYPE:
        scale = scale.to(tl.float32)
        minimum = minimum.to(tl.float32)
    if lower is not None:
        keys = _exactly(code, 8.0, scale.dtype) * (scale * 0.0625) + minimum
    else:
        keys = _exactly(code, 0.0, scale.dtype) * scale + minimum
    return keys.to(DTYPE)


@triton.jit
def attend_stored(  # type: ignore[no-untyped-def]
    acc,
    peak,
    total,
    query,
    positions,
    first,
    end,
    earliest,
    latest,
    table,
    kv_head,
    key_cache,
    value_cache,
    key_params,
    value_params,
    key_lower,
    value_lower,
    key_open,
    value_open,
    open_pages,
    scale,
    cap,
    window,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    CAPPED: tl.constexpr,
    FORM: tl.constexpr,
):
    """The state after the tokens first .. end - 1; `earliest` and `latest` are the rows' first and last position."""
    own = positions // BLOCK_SIZE * BLOCK_SIZE
    settled = end
    if FORM == PAGES:
        settled = tl.minimum(end, latest // BLOCK_SIZE * BLOCK_SIZE)
    # Products are taken of codes less the middle of their range, which are exact in any type, and scaled behind them.
    MIDDLE: tl.constexpr = 8.0 if FORM == PAGES and key_lower is None else 128.0
    sums = tl.sum(query.to(tl.float32), 1)
    dims = tl.arange(0, D_PAD)[:, None]
    value_dims = tl.arange(0, DV_PAD)[None, :]
    for token in range(first, settled, TILE):
        tokens = token + tl.arange(0, TILE)
        inside = tokens < settled
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        rows = (blocks * BLOCK_SIZE + tokens % BLOCK_SIZE) * HEADS + kv_head
        distance = positions[:, None] - tokens[None, :]
        visible = (distance >= 0) & (distance < window) & inside[None, :]
        if FORM == PAGES:
            visible = visible & (tokens[None, :] < own[:, None])

        known = inside[None, :] & (dims < D)
        code = _codes(key_cache, key_lower, rows[None, :], dims, known, D, FORM)
        if FORM == FP8:
            scores = tl.dot(query, e4m3_to_half(code).to(query.dtype), input_precision="ieee")
        elif FORM == PAGES:
            pages = (blocks * HEADS + kv_head)[None, :]
            keys = _channel_keys(code, key_params, key_lower, pages, dims, known, D, query.dtype)
            scores = tl.dot(query, keys, input_precision="ieee")
        else:
            step, offset = _token_params(key_params, key_lower, rows, inside, MIDDLE)
            products = tl.dot(query, _exactly(code, MIDDLE, query.dtype), input_precision="ieee")
            scores = products * step[None, :] + sums[:, None] * offset[None, :]
        weights, fade, peak, total = soften(peak, total, scores, visible, scale, cap, CAPPED, MASKED=True)

        known = inside[:, None] & (value_dims < DV)
        code = _codes(value_cache, value_lower, rows[:, None], value_dims, known, DV, FORM)
        if FORM == FP8:
            values = e4m3_to_half(code).to(query.dtype)
            acc = tl.dot(weights.to(query.dtype), values, acc * fade[:, None], input_precision="ieee")
        else:
            step, offset = _token_params(value_params, value_lower, rows, inside, MIDDLE)
            acc = acc * fade[:, None] + tl.sum(weights * offset[None, :], 1)[:, None]
            stepped = (weights * step[None, :]).to(query.dtype)
            acc = tl.dot(stepped, _exactly(code, MIDDLE, query.dtype), acc, input_precision="ieee")
    if FORM == PAGES:
        for token in range(tl.maximum(first, earliest // BLOCK_SIZE * BLOCK_SIZE), end, TILE):
            tokens = token + tl.arange(0, TILE)
            inside = tokens < end
            blocks = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0)
            opened = tl.load(open_pages + blocks, mask=inside, other=0).to(tl.int64)
            rows = (opened * BLOCK_SIZE + tokens % BLOCK_SIZE) * HEADS + kv_head
            keys = tl.load(key_open + rows[None, :] * D + dims, mask=inside[None, :] & (dims < D), other=0.0)
            values = tl.load(value_open + rows[:, None] * DV + value_dims, mask=inside[:, None] & (value_dims < DV), other=0.0)
            distance = positions[:, None] - tokens[None, :]
            visible = (distance >= 0) & (distance < window) & (tokens[None, :] >= own[:, None])
            scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee")
            weights, fade, peak, total = soften(peak, total, scores, visible, scale, cap, CAPPED, MASKED=True)
            weights = weights.to(query.dtype)
            acc = tl.dot(weights, values.to(query.dtype), acc * fade[:, None], input_precision="ieee")
    return acc, peak, total
