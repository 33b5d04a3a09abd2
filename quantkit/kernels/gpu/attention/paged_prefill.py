"""Attention of many new tokens a sequence, packed without padding, to the paged context and to themselves.

Everything is read from the caches, where the new keys and values lie already, so a chunk of a long prompt and a prompt
behind a shared prefix need no case of their own. One program takes a tile of rows (new tokens times the query heads of one
KV head) and walks over the tokens that any of them sees: first the tiles that all rows see whole, which need no mask, then
those at the diagonal and at the far edge of the window.
"""

import triton
import triton.language as tl

from quantkit.kernels.autotune import Config
from quantkit.kernels.gpu.attention.paged_launch import Call
from quantkit.kernels.gpu.attention.paged_plan import padded
from quantkit.kernels.gpu.attention.paged_quantized import PLAIN, attend_stored, cache_arguments, form
from quantkit.kernels.gpu.attention.paged_tile import LOG2E, attend, empty_state, load_query, normalise, widen


@triton.jit
def prefill_kernel(  # type: ignore[no-untyped-def]
    query,
    key_cache,
    value_cache,
    key_params,
    value_params,
    key_lower,
    value_lower,
    key_open,
    value_open,
    open_pages,
    block_table,
    query_start,
    seq_lens,
    sinks,
    out,
    query_stride,
    query_stride_head,
    table_stride,
    scale,
    cap,
    window,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    SHORTEST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    FORM: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid (row tiles of the longest sequence, HEADS, S). Sequences with fewer than SHORTEST new tokens are left alone."""
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - start
    length = tl.load(seq_lens + sequence)
    # The last rows see most: they start first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if count < SHORTEST or first_row >= count * RATIO:
        return

    rows = first_row + tl.arange(0, ROWS)
    tile, positions = load_query(
        query, query_stride, query_stride_head, start, count, length, rows, kv_head, RATIO, D, D_PAD, WIDEN
    )
    earliest = length - count + first_row // RATIO
    latest = length - count + tl.minimum((first_row + ROWS - 1) // RATIO, count - 1)
    begin = tl.maximum(earliest - window + 1, 0)
    table = block_table + sequence.to(tl.int64) * table_stride
    acc, peak, total = empty_state(ROWS, DV_PAD)
    if FORM == PLAIN:
        key_head, value_head = key_cache + kv_head * D, value_cache + kv_head * DV
        # Tiles are counted from the first token that any row sees; `lead` of them straddle the edge of the window.
        tiles = tl.cdiv(tl.maximum(latest + 1 - begin, 0), TILE)
        lead = tl.cdiv(tl.maximum(latest - window + 1 - begin, 0), TILE)
        whole = tl.maximum(tl.maximum(earliest + 1 - begin, 0) // TILE - lead, 0)
        for i in range(lead, lead + whole):
            acc, peak, total = attend(
                acc, peak, total, tile, positions, begin + i * TILE, length, table, key_head, value_head, scale, cap, window,
                HEADS, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, CAPPED, WIDEN, MASKED=False,
            )  # fmt: skip
        for edge in range(tiles - whole):
            i = tl.where(edge < lead, edge, edge + whole)
            acc, peak, total = attend(
                acc, peak, total, tile, positions, begin + i * TILE, length, table, key_head, value_head, scale, cap, window,
                HEADS, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, CAPPED, WIDEN, MASKED=True,
            )  # fmt: skip
    else:
        acc, peak, total = attend_stored(
            acc, peak, total, tile, positions, begin, latest + 1, earliest, latest, table, kv_head, key_cache, value_cache,
            key_params, value_params, key_lower, value_lower, key_open, value_open, open_pages, scale, cap, window,
            HEADS, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, CAPPED, FORM,
        )  # fmt: skip

    dims = tl.arange(0, DV_PAD)
    inside = rows < count * RATIO
    heads = kv_head * RATIO + rows % RATIO
    sink = tl.full([ROWS], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks + heads, mask=inside, other=0.0) * LOG2E
    place = ((start + rows // RATIO).to(tl.int64) * (HEADS * RATIO) + heads) * DV
    result = normalise(acc, peak, total, sink).to(out.dtype.element_ty)
    tl.store(out + place[:, None] + dims[None, :], result, mask=inside[:, None] & (dims < DV)[None, :])


def paged_prefill(call: Call, longest: int, config: Config, shortest: int = 1) -> None:
    """Write the rows of `call.out` that belong to sequences of at least `shortest` new tokens.

    Args:
        call: see there.
        longest: most new tokens of any sequence.
        config: see `paged_plan`.
        shortest: new tokens of a sequence, 1 at least.
    """
    query, ratio, scores = call.query, call.ratio, call.scores
    (_, block_size, heads, dim), value_dim = call.key_cache.shape, call.value_cache.shape[3]
    prefill_kernel[(triton.cdiv(longest * ratio, config["rows"]), heads, len(call.seq_lens))](
        query, *cache_arguments(call.key_cache, call.value_cache, call.draft), call.block_table, call.query_start,
        call.seq_lens, call.sinks, call.out,
        query.stride(0), query.stride(1), call.block_table.stride(0), scores.scale, scores.cap, scores.window,
        HEADS=heads, RATIO=ratio, SHORTEST=shortest, ROWS=config["rows"], BLOCK_SIZE=block_size, TILE=config["tokens"],
        D=dim, D_PAD=padded(dim), DV=value_dim, DV_PAD=padded(value_dim), CAPPED=scores.cap > 0,
        SINKS=call.sinks is not None, FORM=form(call.key_cache), WIDEN=widen(query),
        num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip
