"""Attention of a tile of query rows to a tile of paged tokens: the inner step of both paged kernels.

    scores   = query keys^T * scale      softmax in base 2: exp(s) = exp2(s * log2(e)), the factor folded into the scale
    row_max' = max(row_max, max of scores)
    rescale  = exp2(row_max - row_max')
    row_sum' = row_sum * rescale + sum of exp2(scores - row_max')
    acc'     = acc     * rescale + exp2(scores - row_max') values

(online softmax, arXiv 1805.02867; arXiv 2205.14135, algorithm 1). The rows of a tile are the new tokens of one sequence times
the query heads that share one KV head, so that each key is read once for all of them: row r is token r // RATIO, head r %
RATIO of the group. Tokens are gathered one by one through the block table; a tile may span many blocks.

`row_max` starts at a finite number below any score: if a row sees nothing in a tile, row_sum stays 0 and there is no NaN.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def empty_state(ROWS: tl.constexpr, DV_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc [ROWS, DV_PAD], row_max [ROWS] and row_sum [ROWS] before the first tile."""
    row_max = tl.full([ROWS], -1.0e30, tl.float32)
    return tl.zeros([ROWS, DV_PAD], tl.float32), row_max, tl.zeros([ROWS], tl.float32)


@triton.jit
def load_query(  # type: ignore[no-untyped-def]
    query,
    stride_token,
    stride_head,
    start,
    count,
    length,
    rows,
    kv_head,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """(tile [ROWS, D_PAD], positions [ROWS]) of one sequence's rows; rows past its `count` tokens get position -1."""
    tokens = rows // RATIO
    heads = kv_head * RATIO + rows % RATIO
    dims = tl.arange(0, D_PAD)
    pointers = query + (start.to(tl.int64) + tokens) * stride_token + heads * stride_head
    inside = (tokens < count)[:, None] & (dims < D)[None, :]
    tile = tl.load(pointers[:, None] + dims[None, :], mask=inside, other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile, tl.where(tokens < count, length - count + tokens, -1)


@triton.jit
def _load(pointers, inside, mask_dims, MASKED: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    if PADDED:
        tile = tl.load(pointers, mask=inside & mask_dims, other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=inside, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def online_softmax(row_max, row_sum, scores, visible, scale, cap, CAPPED: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """One step of the online softmax over raw scores [ROWS, TILE], of which only the `visible` ones count.

    Returns the weights [ROWS, TILE], the factor [ROWS] that rescales the accumulator, and the new row_max and row_sum [ROWS].
    """
    scores *= scale
    if CAPPED:
        scores = cap - 2.0 * cap / (1.0 + tl.exp2(scores))
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    acc,
    row_max,
    row_sum,
    query,
    positions,
    first,
    length,
    table,
    key_head,
    value_head,
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
    WIDEN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The state after attending to tokens first .. first + TILE - 1 of a sequence of `length` tokens.

    table points to the sequence's row of the block table; key_head and value_head point to the first token of the caches, at
    the KV head. HEADS is the number of KV heads. Without MASKED, every row sees every token of the tile. WIDEN computes in
    float32, for the interpreter, whose bfloat16 arithmetic is wrong.
    """
    tokens = first + tl.arange(0, TILE)
    inside = tokens < length
    blocks = _load(table + tokens // BLOCK_SIZE, inside, inside, MASKED, False)
    slots = blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
    dims = tl.arange(0, D_PAD)
    pointers = key_head + slots[None, :] * (HEADS * D) + dims[:, None]
    keys = _load(pointers, inside[None, :], (dims < D)[:, None], MASKED, D != D_PAD)
    dims = tl.arange(0, DV_PAD)
    pointers = value_head + slots[:, None] * (HEADS * DV) + dims[None, :]
    values = _load(pointers, inside[:, None], (dims < DV)[None, :], MASKED, DV != DV_PAD)
    if WIDEN:
        keys = keys.to(tl.float32)
        values = values.to(tl.float32)

    distance = positions[:, None] - tokens[None, :]
    visible = (distance >= 0) & (distance < window)
    scores = tl.dot(query, keys, input_precision="ieee")
    weights, rescale, row_max, row_sum = online_softmax(row_max, row_sum, scores, visible, scale, cap, CAPPED, MASKED)
    return tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee"), row_max, row_sum


@triton.jit
def normalize(acc, row_max, row_sum, sink):  # type: ignore[no-untyped-def]
    """acc [ROWS, DV_PAD] / row_sum, with `sink` [ROWS] (in base 2; -inf: none) included in the softmax; 0 for rows that saw
    nothing.
    """
    new_max = tl.maximum(row_max, sink)
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.exp2(sink - new_max)
    return acc * (rescale / tl.where(row_sum > 0, row_sum, 1.0))[:, None]
