"""Attention of few new tokens (1 to 8 a sequence) to a long paged context: split-KV with a merge pass.

Reading the cache is all that costs time here, so the machine must be filled with readers however few sequences there are.
Each sequence's visible tokens are cut into `splits` spans of whole tiles, one program for each (sequence, KV head, span),
whatever the number of new tokens: verifying a draft of 8 reads the cache once. A second kernel merges the spans
(arXiv 2311.01282, section 3; "Flash-Decoding"). With one span the first kernel writes the result itself.

Lengths are read on the device and the grid depends on shapes alone, so that a captured CUDA graph stays right while
sequences grow: short sequences use fewer of the spans and the other programs end at once.
"""

import torch
import triton
import triton.language as tl

from quantkit.kernels.autotune import Config
from quantkit.kernels.gpu.attention.paged_launch import Call
from quantkit.kernels.gpu.attention.paged_plan import MIN_TILES, padded, useful_splits
from quantkit.kernels.gpu.attention.paged_quantized import PLAIN, attend_stored, cache_arguments, form
from quantkit.kernels.gpu.attention.paged_tile import LOG2E, attend, empty_state, load_query, normalise, widen

#: Most new tokens of a sequence that the decode kernel takes.
LONGEST_DECODE = 8

#: Spans that the merge reads at once.
CHUNK = tl.constexpr(16)


@triton.jit
def _span(count, length, window, split, splits, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first token, end, number of spans in use) of a span: the tokens that the first of `count` queries sees, and later."""
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
    key_open,
    value_open,
    open_pages,
    block_table,
    query_start,
    seq_lens,
    sinks,
    out,
    part_acc,
    part_peak,
    part_total,
    query_stride,
    query_stride_head,
    table_stride,
    scale,
    cap,
    window,
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
    FORM: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid (HEADS * row tiles, S, splits). Sequences with more than LONGEST new tokens are left to the prefill kernel.

    DIRECT (one span): writes out [T, Hq, DV]. Otherwise the state of row r of a span goes to part_acc [P, DV], part_peak [P]
    and part_total [P], all float32, at P = ((sequence * HEADS + KV head) * splits + split) * LONGEST * RATIO + r.
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
    acc, peak, total = empty_state(ROWS, DV_PAD)
    if FORM == PLAIN:
        for token in range(first, end, TILE):
            acc, peak, total = attend(
                acc, peak, total, tile, positions, token, length, table, key_cache + kv_head * D, value_cache + kv_head * DV,
                scale, cap, window, HEADS, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, CAPPED, WIDEN, MASKED=True,
            )  # fmt: skip
    else:
        acc, peak, total = attend_stored(
            acc, peak, total, tile, positions, first, end, length - count, length - 1, table, kv_head, key_cache, value_cache,
            key_params, value_params, key_lower, value_lower, key_open, value_open, open_pages, scale, cap, window,
            HEADS, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, CAPPED, FORM,
        )  # fmt: skip

    dims = tl.arange(0, DV_PAD)
    if DIRECT:
        inside = rows < count * RATIO
        heads = kv_head * RATIO + rows % RATIO
        sink = tl.full([ROWS], float("-inf"), tl.float32)
        if SINKS:
            sink = tl.load(sinks + heads, mask=inside, other=0.0) * LOG2E
        place = ((start + rows // RATIO).to(tl.int64) * (HEADS * RATIO) + heads) * DV
        result = normalise(acc, peak, total, sink).to(out.dtype.element_ty)
        tl.store(out + place[:, None] + dims[None, :], result, mask=inside[:, None] & (dims < DV)[None, :])
    else:
        inside = rows < LONGEST * RATIO
        place = ((sequence.to(tl.int64) * HEADS + kv_head) * splits + split) * (LONGEST * RATIO) + rows
        tl.store(part_acc + place[:, None] * DV + dims[None, :], acc, mask=inside[:, None] & (dims < DV)[None, :])
        tl.store(part_peak + place, peak, mask=inside)
        tl.store(part_total + place, total, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(  # type: ignore[no-untyped-def]
    part_acc,
    part_peak,
    part_total,
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
    """Grid (LONGEST * HEADS * RATIO, S): out of one token and query head from the spans' states."""
    token, head, sequence = tl.program_id(0) // (HEADS * RATIO), tl.program_id(0) % (HEADS * RATIO), tl.program_id(1)
    start = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - start
    if count > LONGEST or token >= count:
        return
    _, _, used = _span(count, tl.load(seq_lens + sequence), window, 0, splits, TILE)
    base = (sequence.to(tl.int64) * HEADS + head // RATIO) * splits * (LONGEST * RATIO) + token * RATIO + head % RATIO

    spans = tl.arange(0, SPLITS_PAD)
    peaks = tl.load(part_peak + base + spans * (LONGEST * RATIO), mask=spans < used, other=-1.0e30)
    totals = tl.load(part_total + base + spans * (LONGEST * RATIO), mask=spans < used, other=0.0)
    peak = tl.max(peaks, 0)
    total = tl.sum(totals * tl.exp2(peaks - peak), 0)
    acc = tl.zeros([DV_PAD], tl.float32)
    dims = tl.arange(0, DV_PAD)
    for first in range(0, used, CHUNK):
        chunk = first + tl.arange(0, CHUNK)
        place = base + chunk * (LONGEST * RATIO)
        weights = tl.exp2(tl.load(part_peak + place, mask=chunk < used, other=-1.0e30) - peak)
        inside = (chunk < used)[:, None] & (dims < DV)[None, :]
        acc += tl.sum(weights[:, None] * tl.load(part_acc + place[:, None] * DV + dims[None, :], mask=inside, other=0.0), 0)

    sink = tl.full([1], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks + head + tl.arange(0, 1)) * LOG2E
    result = normalise(acc[None, :], peak, total, sink).to(out.dtype.element_ty)
    place = ((start + token).to(tl.int64) * (HEADS * RATIO) + head) * DV
    tl.store(out + place + dims[None, :], result, mask=(dims < DV)[None, :])


def paged_decode(call: Call, longest: int, config: Config) -> None:
    """Write the rows of `call.out` that belong to sequences of at most `longest` new tokens.

    Args:
        call: see there.
        longest: new tokens of a sequence, 1 to LONGEST_DECODE.
        config: see `paged_plan`; of its spans no more are used than the block table has tokens for.
    """
    query, ratio, sequences = call.query, call.ratio, len(call.seq_lens)
    (_, block_size, heads, dim), value_dim = call.key_cache.shape, call.value_cache.shape[3]
    all_rows = longest * ratio
    readers = heads * triton.cdiv(all_rows, config["rows"])
    splits = min(config["splits"], useful_splits(call.visible(longest), config["tokens"]))
    parts = sequences * heads * splits * all_rows if splits > 1 else 0
    part_acc = torch.empty(parts, value_dim, dtype=torch.float32, device=query.device)
    part_peak, part_total = torch.empty(2, parts, dtype=torch.float32, device=query.device)
    shared = {"HEADS": heads, "RATIO": ratio, "LONGEST": longest, "TILE": config["tokens"]}
    shared |= {"DV": value_dim, "DV_PAD": padded(value_dim), "SINKS": call.sinks is not None}
    lengths, scores = (call.query_start, call.seq_lens, call.sinks, call.out), call.scores
    decode_kernel[(readers, sequences, splits)](
        query, *cache_arguments(call.key_cache, call.value_cache, call.draft), call.block_table, *lengths,
        part_acc, part_peak, part_total,
        query.stride(0), query.stride(1), call.block_table.stride(0), scores.scale, scores.cap, scores.window,
        ROWS=config["rows"], BLOCK_SIZE=block_size, D=dim, D_PAD=padded(dim), CAPPED=scores.cap > 0, DIRECT=splits == 1,
        FORM=form(call.key_cache), WIDEN=widen(query), num_warps=config["warps"], num_stages=config["stages"], **shared,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(all_rows * heads, sequences)](
            part_acc, part_peak, part_total, *lengths, scores.window, splits,
            SPLITS_PAD=triton.next_power_of_2(splits), **shared,
        )  # fmt: skip
