"""Quantized caches in the paged kernels: tiles of codes are dequantized and then scored like any other tile.

If blocks are quantized as a whole, a row sees its own page in 16 bit and earlier pages quantized (see `quantized_kv`). So
there are two passes over the tokens: the first reads quantized pages, masking keys at or after the row's own page; the second
reads tail pages and masks the complement. Only the pages of the tile's own rows are read in both.
"""

import torch
import triton
import triton.language as tl

from quantkit.kernels.gpu.attention.paged_tile import online_softmax
from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV

#: Kinds of cache: numbers in the query's type; e4m3 bytes; int8 codes; int4 or 4+4-bit codes with tail pages.
PLAIN, FP8, INT8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


def cache_kind(cache: Cache) -> int:
    """Which kind of cache it is."""
    if isinstance(cache, QuantizedKV):
        return int((INT8 if cache.tail_pages is None else INT4).value)
    return int((FP8 if cache.dtype == torch.float8_e4m3fn else PLAIN).value)


@triton.jit
def e4m3_to_half(code):  # type: ignore[no-untyped-def]
    """float16 from uint16 e4m3 codes: shifts the bits and rebiases the exponent by 2^8, exactly. Works on GPUs without
    float8.
    """
    return (((code & 0x7F) << 7) | ((code & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _code_to_float(code, LESS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """code - LESS for uint16 codes below 256: 0x6400 with the code in its lowest bits is 1024 + code in float16."""
    return ((code | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + LESS)).to(DTYPE)


@triton.jit
def _codes(data, lower, row, dim, inside, D: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of uint16 codes; for 4+4 bit, 16 * upper + lower. `row` (token and head) varies along one dimension, `dim` along
    the other."""
    if KIND == INT4:
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
    """step and offset per token, float32, such that x = step * (code - MIDDLE) + offset."""
    step = tl.load(params + row * 2, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(params + row * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    if lower is not None:
        step *= 0.0625
        offset -= 8.0 * step
    return step, offset + MIDDLE * step


@triton.jit
def _channel_keys(code, params, lower, page, dim, inside, D: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys with parameters per page and channel. For 16-bit queries they are computed in float16, which is precise enough."""
    scale = tl.load(params + page * (2 * D) + dim, mask=inside, other=0.0)
    minimum = tl.load(params + page * (2 * D) + D + dim, mask=inside, other=0.0)
    if tl.float32 == DTYPE:
        scale = scale.to(tl.float32)
        minimum = minimum.to(tl.float32)
    if lower is not None:
        keys = _code_to_float(code, 8.0, scale.dtype) * (scale * 0.0625) + minimum
    else:
        keys = _code_to_float(code, 0.0, scale.dtype) * scale + minimum
    return keys.to(DTYPE)


@triton.jit
def attend_quantized(  # type: ignore[no-untyped-def]
    acc,
    row_max,
    row_sum,
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
    key_tail,
    value_tail,
    tail_page_ids,
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
    KIND: tl.constexpr,
):
    """The state after attending to tokens first .. end - 1; `earliest` and `latest` are the first and last position of the
    rows.
    """
    own_page = positions // BLOCK_SIZE * BLOCK_SIZE
    quantized_end = end
    if KIND == INT4:
        quantized_end = tl.minimum(end, latest // BLOCK_SIZE * BLOCK_SIZE)
    # The products use codes minus the middle of their range, which are exact in any type, and are scaled afterwards.
    MIDDLE: tl.constexpr = 8.0 if KIND == INT4 and key_lower is None else 128.0
    sums = tl.sum(query.to(tl.float32), 1)
    dims = tl.arange(0, D_PAD)[:, None]
    value_dims = tl.arange(0, DV_PAD)[None, :]
    for token in range(first, quantized_end, TILE):
        tokens = token + tl.arange(0, TILE)
        inside = tokens < quantized_end
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        rows = (blocks * BLOCK_SIZE + tokens % BLOCK_SIZE) * HEADS + kv_head
        distance = positions[:, None] - tokens[None, :]
        visible = (distance >= 0) & (distance < window) & inside[None, :]
        if KIND == INT4:
            visible = visible & (tokens[None, :] < own_page[:, None])

        valid = inside[None, :] & (dims < D)
        code = _codes(key_cache, key_lower, rows[None, :], dims, valid, D, KIND)
        if KIND == FP8:
            scores = tl.dot(query, e4m3_to_half(code).to(query.dtype), input_precision="ieee")
        elif KIND == INT4:
            pages = (blocks * HEADS + kv_head)[None, :]
            keys = _channel_keys(code, key_params, key_lower, pages, dims, valid, D, query.dtype)
            scores = tl.dot(query, keys, input_precision="ieee")
        else:
            step, offset = _token_params(key_params, key_lower, rows, inside, MIDDLE)
            products = tl.dot(query, _code_to_float(code, MIDDLE, query.dtype), input_precision="ieee")
            scores = products * step[None, :] + sums[:, None] * offset[None, :]
        weights, rescale, row_max, row_sum = online_softmax(row_max, row_sum, scores, visible, scale, cap, CAPPED, MASKED=True)

        valid = inside[:, None] & (value_dims < DV)
        code = _codes(value_cache, value_lower, rows[:, None], value_dims, valid, DV, KIND)
        if KIND == FP8:
            values = e4m3_to_half(code).to(query.dtype)
            acc = tl.dot(weights.to(query.dtype), values, acc * rescale[:, None], input_precision="ieee")
        else:
            step, offset = _token_params(value_params, value_lower, rows, inside, MIDDLE)
            acc = acc * rescale[:, None] + tl.sum(weights * offset[None, :], 1)[:, None]
            stepped = (weights * step[None, :]).to(query.dtype)
            acc = tl.dot(stepped, _code_to_float(code, MIDDLE, query.dtype), acc, input_precision="ieee")
    if KIND == INT4:
        for token in range(tl.maximum(first, earliest // BLOCK_SIZE * BLOCK_SIZE), end, TILE):
            tokens = token + tl.arange(0, TILE)
            inside = tokens < end
            blocks = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0)
            tail = tl.load(tail_page_ids + blocks, mask=inside, other=0).to(tl.int64)
            rows = (tail * BLOCK_SIZE + tokens % BLOCK_SIZE) * HEADS + kv_head
            keys = tl.load(key_tail + rows[None, :] * D + dims, mask=inside[None, :] & (dims < D), other=0.0)
            values = tl.load(value_tail + rows[:, None] * DV + value_dims, mask=inside[:, None] & (value_dims < DV), other=0.0)
            distance = positions[:, None] - tokens[None, :]
            visible = (distance >= 0) & (distance < window) & (tokens[None, :] >= own_page[:, None])
            scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee")
            weights, rescale, row_max, row_sum = online_softmax(
                row_max, row_sum, scores, visible, scale, cap, CAPPED, MASKED=True
            )
            weights = weights.to(query.dtype)
            acc = tl.dot(weights, values.to(query.dtype), acc * rescale[:, None], input_precision="ieee")
    return acc, row_max, row_sum
