"""Attention of few new tokens (1 to 8 per sequence) to a long paged context: split KV with a merge pass.

Almost all time goes into reading the cache, so even a few sequences must keep the whole GPU busy reading. Each sequence's
visible tokens are cut into `splits` spans of whole tiles, with one program per (sequence, KV head, span), whatever the number
of new tokens: verifying a draft of 8 tokens reads the cache once. A second kernel merges the spans (arXiv 2311.01282, section
3; "Flash-Decoding"). With one span, the first kernel writes the result itself.

Lengths are read on the device, and the grid depends on shapes alone. So a captured CUDA graph stays valid while sequences
grow: short sequences use fewer spans, and the programs of the other spans end at once.
"""

import torch
import triton
import triton.language as tl

from quantkit.kernels.autotune import Config
from quantkit.kernels.gpu.attention.paged_args import AttentionArgs
from quantkit.kernels.gpu.attention.paged_launch import launch
from quantkit.kernels.gpu.attention.paged_plan import MIN_TILES, padded_dim, useful_splits
from quantkit.kernels.gpu.attention.paged_quantized import PLAIN, attend_quantized
from quantkit.kernels.gpu.attention.paged_tile import LOG2E, attend, empty_state, load_query, normalize

#: The most new tokens per sequence that the decode kernel takes.
LONGEST_DECODE = 8

#: Spans that the merge kernel reads at a time.
CHUNK = tl.constexpr(16)


@triton.jit
def _span(count, length, window, split, splits, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first token, end, number of spans in use) of a span. All spans together hold the tokens that any of `count` queries
    sees.
    """
    begin = tl.maximum(length - count - window + 1, 0)
    tiles = tl.cdiv(tl.maximum(length - begin, 0), TILE)
    size = tl.maximum(tl.cdiv(tiles, splits), MIN_TILES)
    first = begin + split * size * TILE
    return first, tl.minimum(first + size * TILE, length), tl.cdiv(tiles, size)


@triton.jit
def decode_kernel(  # type: ignore[no-untyped-def]
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
    part_acc,
    part_max,
    part_sum,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    LONGEST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    DIRECT: tl.constexpr,
    KIND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid (HEADS * row tiles, S, splits). Sequences with more than LONGEST new tokens are left to the prefill kernel.

    With DIRECT (one span), writes out [T, Hq, DV]. Otherwise the state of row r of a span goes to part_acc [P, DV], part_max
    [P] and part_sum [P], all float32, at index ((sequence * HEADS + KV head) * splits + split) * LONGEST * RATIO + r.
    """
    kv_head, sequence, split = tl.program_id(0) % HEADS, tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    start = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - start
    length = tl.load(seq_lens + sequence)
    first, end, used = _span(count, length, window, split, splits, TILE)
    if count > LONGEST or (not DIRECT and split >= used):
        return

    rows = tl.program_id(0) // HEADS * ROWS + tl.arange(0, ROWS)
    tile, positions = load_query(
        query, query_stride, query_stride_head, start, count, length, rows, kv_head, RATIO, D, D_PAD, WIDEN
    )
    table = block_table + sequence.to(tl.int64) * table_stride
    acc, row_max, row_sum = empty_state(ROWS, DV_PAD)
    if KIND == PLAIN:
        for token in range(first, end, TILE):
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, tile, positions, token, length, table, key_cache + kv_head * D,
                value_cache + kv_head * DV, scale, cap, window, HEADS, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, CAPPED, WIDEN,
                MASKED=True, )  # fmt: skip
    else:
        acc, row_max, row_sum = attend_quantized(
            acc, row_max, row_sum, tile, positions, first, end, length - count, length - 1, table, kv_head, key_cache,
            value_cache, key_params, value_params, key_lower, value_lower, key_tail, value_tail, tail_page_ids, scale, cap,
            window, HEADS, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, CAPPED, KIND,
        )  # fmt: skip

    dims = tl.arange(0, DV_PAD)
    if DIRECT:
        inside = rows < count * RATIO
        heads = kv_head * RATIO + rows % RATIO
        sink = tl.full([ROWS], float("-inf"), tl.float32)
        if SINKS:
            sink = tl.load(sinks + heads, mask=inside, other=0.0) * LOG2E
        index = ((start + rows // RATIO).to(tl.int64) * (HEADS * RATIO) + heads) * DV
        result = normalize(acc, row_max, row_sum, sink).to(out.dtype.element_ty)
        tl.store(out + index[:, None] + dims[None, :], result, mask=inside[:, None] & (dims < DV)[None, :])
    else:
        inside = rows < LONGEST * RATIO
        index = ((sequence.to(tl.int64) * HEADS + kv_head) * splits + split) * (LONGEST * RATIO) + rows
        tl.store(part_acc + index[:, None] * DV + dims[None, :], acc, mask=inside[:, None] & (dims < DV)[None, :])
        tl.store(part_max + index, row_max, mask=inside)
        tl.store(part_sum + index, row_sum, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(  # type: ignore[no-untyped-def]
    part_acc,
    part_max,
    part_sum,
    query_start,
    seq_lens,
    sinks,
    out,
    window,
    splits,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    LONGEST: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Grid (LONGEST * HEADS * RATIO, S): merges the states of the spans for one token and query head, and writes `out`."""
    token, head, sequence = tl.program_id(0) // (HEADS * RATIO), tl.program_id(0) % (HEADS * RATIO), tl.program_id(1)
    start = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - start
    if count > LONGEST or token >= count:
        return
    _, _, used = _span(count, tl.load(seq_lens + sequence), window, 0, splits, TILE)
    base = (sequence.to(tl.int64) * HEADS + head // RATIO) * splits * (LONGEST * RATIO) + token * RATIO + head % RATIO

    spans = tl.arange(0, SPLITS_PAD)
    maxima = tl.load(part_max + base + spans * (LONGEST * RATIO), mask=spans < used, other=-1.0e30)
    sums = tl.load(part_sum + base + spans * (LONGEST * RATIO), mask=spans < used, other=0.0)
    row_max = tl.max(maxima, 0)
    row_sum = tl.sum(sums * tl.exp2(maxima - row_max), 0)
    acc = tl.zeros([DV_PAD], tl.float32)
    dims = tl.arange(0, DV_PAD)
    for first in range(0, used, CHUNK):
        chunk = first + tl.arange(0, CHUNK)
        index = base + chunk * (LONGEST * RATIO)
        weights = tl.exp2(tl.load(part_max + index, mask=chunk < used, other=-1.0e30) - row_max)
        inside = (chunk < used)[:, None] & (dims < DV)[None, :]
        acc += tl.sum(weights[:, None] * tl.load(part_acc + index[:, None] * DV + dims[None, :], mask=inside, other=0.0), 0)

    sink = tl.full([1], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks + head + tl.arange(0, 1)) * LOG2E
    result = normalize(acc[None, :], row_max, row_sum, sink).to(out.dtype.element_ty)
    index = ((start + token).to(tl.int64) * (HEADS * RATIO) + head) * DV
    tl.store(out + index + dims[None, :], result, mask=(dims < DV)[None, :])


def paged_decode(args: AttentionArgs, longest: int, config: Config) -> None:
    """Write the rows of `args.out` that belong to sequences of at most `longest` new tokens.

    Args:
        args: see `AttentionArgs`.
        longest: most new tokens of a sequence, 1 to LONGEST_DECODE.
        config: see `paged_plan`; no more of its spans are used than the block table has tokens for.
    """
    heads, value_dim, sequences = args.key_cache.shape[2], args.value_cache.shape[3], len(args.seq_lens)
    all_rows = longest * args.ratio
    row_tiles = triton.cdiv(all_rows, config["rows"])
    splits = min(config["splits"], useful_splits(args.visible(longest), config["tokens"]))
    parts = sequences * heads * splits * all_rows if splits > 1 else 0
    part_acc = torch.empty(parts, value_dim, dtype=torch.float32, device=args.query.device)
    part_max, part_sum = torch.empty(2, parts, dtype=torch.float32, device=args.query.device)
    grid = (heads * row_tiles, sequences, splits)
    launch(decode_kernel, grid, args, config, part_acc, part_max, part_sum, LONGEST=longest, DIRECT=splits == 1)
    if splits > 1:
        merge_kernel[(all_rows * heads, sequences)](
            part_acc,
            part_max,
            part_sum,
            args.query_start,
            args.seq_lens,
            args.sinks,
            args.out,
            args.scores.window,
            splits,
            HEADS=heads,
            RATIO=args.ratio,
            LONGEST=longest,
            TILE=config["tokens"],
            SPLITS_PAD=triton.next_power_of_2(splits),
            DV=value_dim,
            DV_PAD=padded_dim(value_dim),
            SINKS=args.sinks is not None,
        )
