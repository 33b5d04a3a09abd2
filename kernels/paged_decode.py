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
from torch import Tensor

from quantkit.kernels.kv_store import Cache
from quantkit.kernels.paged_launch import MIN_TILES, Device, Scores, Tile, number_of_splits
from quantkit.kernels.paged_stored import FP8, PLAIN, attend_stored, cache_arguments, form
from quantkit.kernels.paged_tile import LOG2E, attend, empty_state, load_query, normalise, widen

#: Most new tokens of a sequence that the decode kernel takes.
LONGEST_DECODE = 8

#: Rows of a tile; more (multi-query attention with many heads and a draft) take several programs.
MOST_ROWS = 64

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


def paged_decode(
    query: Tensor,
    key_cache: Cache,
    value_cache: Cache,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    scores: Scores,
    longest: int,
    device: Device,
    draft: bool = False,
) -> None:
    """Write the rows of `out` that belong to sequences of at most `longest` new tokens.

    Args:
        query, key_cache, value_cache, block_table, query_start, seq_lens, sinks: as for `reference.paged_attention`.
        out: [T, Hq, Dv], contiguous.
        scores: scale, soft cap and window.
        longest: new tokens of a sequence, 1 to LONGEST_DECODE.
        device: where the tensors lie.
        draft: see the reference.
    """
    (sequences, width), (_, block_size, heads, dim), value_dim = block_table.shape, key_cache.shape, value_cache.shape[3]
    ratio = query.shape[1] // heads
    all_rows = longest * ratio
    # Two programs share a multiprocessor: while one waits for its first tile, the other reads.
    tile = Tile.of(query, value_dim, triton.next_power_of_2(all_rows), MOST_ROWS, 64, 128, device.shared_memory // 2)
    kind = form(key_cache)
    tile = tile if kind == PLAIN.value else tile.narrow(64, 32 if kind == FP8.value else 64)
    readers = heads * triton.cdiv(all_rows, tile.rows)
    visible = min(width * block_size, scores.window + longest - 1)
    splits = number_of_splits(sequences * readers, visible, tile.tokens, device.processors)
    parts = sequences * heads * splits * all_rows if splits > 1 else 0
    part_acc = torch.empty(parts, value_dim, dtype=torch.float32, device=query.device)
    part_peak, part_total = torch.empty(2, parts, dtype=torch.float32, device=query.device)
    shared = {"HEADS": heads, "RATIO": ratio, "LONGEST": longest, "TILE": tile.tokens}
    shared |= {"DV": value_dim, "DV_PAD": tile.value_dim, "SINKS": sinks is not None}
    # Four warps do it in half the instructions of eight, but before Hopper 64 rows spill their registers.
    warps = 8 if tile.rows == 64 and device.capability < 90 else 4
    decode_kernel[(readers, sequences, splits)](
        query, *cache_arguments(key_cache, value_cache, draft), block_table, query_start, seq_lens, sinks, out,
        part_acc, part_peak, part_total,
        query.stride(0), query.stride(1), block_table.stride(0), scores.scale, scores.cap, scores.window,
        ROWS=tile.rows, BLOCK_SIZE=block_size, D=dim, D_PAD=tile.dim, CAPPED=scores.cap > 0, DIRECT=splits == 1,
        FORM=kind, WIDEN=widen(query), num_warps=warps, num_stages=tile.stages, **shared,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(all_rows * heads, sequences)](
            part_acc, part_peak, part_total, query_start, seq_lens, sinks, out, scores.window, splits,
            SPLITS_PAD=triton.next_power_of_2(splits), **shared,
        )  # fmt: skip
