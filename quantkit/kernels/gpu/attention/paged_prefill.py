"""Attention of many new tokens per sequence, packed without padding, to the paged context and to themselves.

All keys and values are read from the caches, which hold the new ones already. So a chunk of a long prompt and a prompt after a
shared prefix are not special cases. One program takes a tile of rows (new tokens times the query heads of one KV head) and
loops over the tokens that any row sees: first the tiles that all rows see completely, which need no mask, then those at the
diagonal and at the far edge of the window.
"""

import triton
import triton.language as tl

from quantkit.kernels.autotune import Config
from quantkit.kernels.gpu.attention.paged_args import AttentionArgs
from quantkit.kernels.gpu.attention.paged_launch import launch
from quantkit.kernels.gpu.attention.paged_quantized import PLAIN, attend_quantized
from quantkit.kernels.gpu.attention.paged_tile import LOG2E, attend, empty_state, load_query, normalize


@triton.jit
def prefill_kernel(  # type: ignore[no-untyped-def]
    query,
    key_cache,
    value_cache,
    key_params,
    value_params,
    key_lower,
    value_lower,
    key_tail,
    value_tail,
    tail_page_ids,
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
    KIND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid (row tiles of the longest sequence, HEADS, S). Sequences with fewer than SHORTEST new tokens are skipped."""
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - start
    length = tl.load(seq_lens + sequence)
    # The last rows see the most tokens, so they start first.
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
    acc, row_max, row_sum = empty_state(ROWS, DV_PAD)
    if KIND == PLAIN:
        key_head, value_head = key_cache + kv_head * D, value_cache + kv_head * DV
        # Tiles are counted from the first token that any row sees; the first `lead` tiles contain the edge of some row's
        # window.
        tiles = tl.cdiv(tl.maximum(latest + 1 - begin, 0), TILE)
        lead = tl.cdiv(tl.maximum(latest - window + 1 - begin, 0), TILE)
        whole = tl.maximum(tl.maximum(earliest + 1 - begin, 0) // TILE - lead, 0)
        for i in range(lead, lead + whole):
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, tile, positions, begin + i * TILE, length, table, key_head, value_head, scale, cap,
                window, HEADS, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, CAPPED, WIDEN, MASKED=False,
            )  # fmt: skip
        for edge in range(tiles - whole):
            i = tl.where(edge < lead, edge, edge + whole)
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, tile, positions, begin + i * TILE, length, table, key_head, value_head, scale, cap,
                window, HEADS, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, CAPPED, WIDEN, MASKED=True,
            )  # fmt: skip
    else:
        acc, row_max, row_sum = attend_quantized(
            acc, row_max, row_sum, tile, positions, begin, latest + 1, earliest, latest, table, kv_head, key_cache,
            value_cache, key_params, value_params, key_lower, value_lower, key_tail, value_tail, tail_page_ids, scale, cap,
            window, HEADS, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, CAPPED, KIND,
        )  # fmt: skip

    dims = tl.arange(0, DV_PAD)
    inside = rows < count * RATIO
    heads = kv_head * RATIO + rows % RATIO
    sink = tl.full([ROWS], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks + heads, mask=inside, other=0.0) * LOG2E
    index = ((start + rows // RATIO).to(tl.int64) * (HEADS * RATIO) + heads) * DV
    result = normalize(acc, row_max, row_sum, sink).to(out.dtype.element_ty)
    tl.store(out + index[:, None] + dims[None, :], result, mask=inside[:, None] & (dims < DV)[None, :])


def paged_prefill(args: AttentionArgs, longest: int, config: Config, shortest: int = 1) -> None:
    """Write the rows of `args.out` that belong to sequences of at least `shortest` new tokens.

    Args:
        args: see `AttentionArgs`.
        longest: most new tokens of any sequence.
        config: see `paged_plan`.
        shortest: fewest new tokens of a sequence, at least 1.
    """
    row_tiles = triton.cdiv(longest * args.ratio, config["rows"])
    grid = (row_tiles, args.key_cache.shape[2], len(args.seq_lens))
    launch(prefill_kernel, grid, args, config, SHORTEST=shortest)
