"""Quantized caches in the paged kernels: tiles of codes become tiles of numbers, and are then scored like any other.

Where blocks are quantized as a whole, a row sees its own page in 16 bit and earlier ones quantized (see `kv_store`), so the
tokens are walked in two passes: over the quantized pages, hiding from each row what is not before its own page; then over
the open pages, hiding what is. Only the pages of the tile's own rows are in both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.kv_store import Cache, Store
from quantkit.kernels.paged_tile import weigh

#: Forms of a cache: numbers in the query's type, e4m3 bytes, codes with parameters a token, codes with parameters a page.
PLAIN, FP8, INT8, PAGES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


def cache_arguments(key_cache: Cache, value_cache: Cache, draft: bool) -> tuple[Tensor | None, ...]:
    """What kernels take of the caches, keys before values: data, params, lower planes, open pages, and the table of these.

    None for what they lack, or what a draft leaves out.
    """

    def parts(cache: Cache) -> tuple[Tensor | None, ...]:
        if isinstance(cache, Tensor):
            return (cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache), None, None, None
        return cache.codes, cache.params, None if draft else cache.lower, cache.open

    pairs = zip(parts(key_cache), parts(value_cache), strict=True)
    table = key_cache.open_pages if isinstance(key_cache, Store) else None
    return (*(part for pair in pairs for part in pair), table)


def form(cache: Cache) -> int:
    """Which form it has."""
    if isinstance(cache, Store):
        return int((INT8 if cache.open is None else PAGES).value)
    return int((FP8 if cache.dtype == torch.float8_e4m3fn else PLAIN).value)


@triton.jit
def e4m3_to_half(code):  # type: ignore[no-untyped-def]
    """float16 of e4m3 bytes: the bits moved, the exponent rebiased by 2^8, exactly. No GPU needs to know the type."""
    bits = code.to(tl.uint16)
    return (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    data,
    params,
    lower,
    row,
    page,
    dim,
    token_inside,
    dim_inside,
    D: tl.constexpr,
    FORM: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
):
    """float32 tile of a cache. row (of a token and head) and page (of a block and head) run along one dimension, dim along
    the other; what is outside is `minimum` or 0, and finite."""
    inside = token_inside & dim_inside
    if FORM == PAGES:
        half: tl.constexpr = D // 2
        byte, shift = row * half + dim % half, 4 * (dim // half)
        code = (tl.load(data + byte, mask=inside, other=0).to(tl.int32) >> shift) & 15
        if lower is not None:
            code = 16 * code + ((tl.load(lower + byte, mask=inside, other=0).to(tl.int32) >> shift) & 15) - 8
    else:
        code = tl.load(data + row * D + dim, mask=inside, other=0)
    if FORM == FP8:
        number = e4m3_to_half(code).to(tl.float32)
    else:
        if BY_CHANNEL:
            at, known = params + page * (2 * D) + dim, inside
        else:
            at, known = params + row * 2, token_inside
        scale = tl.load(at, mask=known, other=0.0).to(tl.float32)
        minimum = tl.load(at + (D if BY_CHANNEL else 1), mask=known, other=0.0).to(tl.float32)
        number = code.to(tl.float32) * (scale if lower is None else scale * 0.0625) + minimum
    return number


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
    dims = tl.arange(0, D_PAD)[:, None]
    value_dims = tl.arange(0, DV_PAD)[None, :]
    for token in range(first, settled, TILE):
        tokens = token + tl.arange(0, TILE)
        inside = tokens < settled
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        rows = (blocks * BLOCK_SIZE + tokens % BLOCK_SIZE) * HEADS + kv_head
        pages = blocks * HEADS + kv_head
        keys = _read(
            key_cache, key_params, key_lower, rows[None, :], pages[None, :], dims, inside[None, :], dims < D,
            D, FORM, FORM == PAGES,
        )  # fmt: skip
        values = _read(
            value_cache, value_params, value_lower, rows[:, None], pages[:, None], value_dims, inside[:, None],
            value_dims < DV, DV, FORM, False,
        )  # fmt: skip
        distance = positions[:, None] - tokens[None, :]
        visible = (distance >= 0) & (distance < window) & inside[None, :]
        if FORM == PAGES:
            visible = visible & (tokens[None, :] < own[:, None])
        acc, peak, total = weigh(
            acc, peak, total, query, keys.to(query.dtype), values.to(query.dtype), visible, scale, cap, CAPPED, MASKED=True
        )
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
            acc, peak, total = weigh(
                acc, peak, total, query, keys.to(query.dtype), values.to(query.dtype), visible, scale, cap, CAPPED, MASKED=True
            )
    return acc, peak, total
