"""Attention over the paged KV cache: which kernel takes which sequence."""

from functools import cache

import torch
from torch import Tensor

from quantkit.kernels.kv_store import Cache
from quantkit.kernels.paged_decode import LONGEST_DECODE, paged_decode
from quantkit.kernels.paged_launch import Device, Scores, check
from quantkit.kernels.paged_prefill import paged_prefill
from quantkit.kernels.paged_tile import interpreted


@cache
def _device(device: torch.device) -> Device:
    if interpreted():
        return Device(80, 4, 1 << 17)
    properties = torch.cuda.get_device_properties(device)
    # Builds of torch for other makers' GPUs lack the larger limit.
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count, int(shared))


def paged_attention(
    query: Tensor,
    key_cache: Cache,
    value_cache: Cache,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    draft: bool = False,
    max_query_len: int | None = None,
) -> Tensor:
    """What `reference.paged_attention` computes, by Triton kernels on an NVIDIA GPU.

    Sequences of up to 8 new tokens go to the decode kernel and longer ones to the prefill kernel; a step that has both
    runs both, each writing its rows.

    Args:
        query: [T, Hq, D] float16, bfloat16 or float32, on a CUDA device; rows and heads at any stride. Hq is a multiple of
            Hkv.
        key_cache: [num_blocks, block_size, Hkv, D], contiguous, in query's dtype or float8 e4m3, or a `Store`; block_size is a
            power of two.
        value_cache: [num_blocks, block_size, Hkv, Dv], likewise.
        block_table: int32 [S, max_blocks]; what lies beyond a sequence's length is not read.
        query_start: int32 [S + 1], first row of each sequence; the last entry is T.
        seq_lens: int32 [S], tokens in the cache, the new ones included; 0 for padding, whose rows come out as zeros.
        scale, window, softcap, draft: as for the reference.
        sinks: float32 [Hq] or None.
        max_query_len: most new tokens of any sequence. Without it, it is read from the device, which waits for the stream
            and cannot be captured in a CUDA graph.

    Returns:
        [T, Hq, Dv] in query's dtype; products are accumulated in float32.
    """
    check(query, key_cache, value_cache, block_table, query_start, seq_lens, sinks)
    (tokens, query_heads, _), sequences = query.shape, len(seq_lens)
    out = query.new_empty(tokens, query_heads, value_cache.shape[3])
    if tokens == 0:
        return out
    longest = int(query_start.diff().max()) if max_query_len is None else max_query_len
    arguments = (query, key_cache, value_cache, block_table, query_start, seq_lens, sinks, out)
    scores, device = Scores.of(scale, window, softcap), _device(query.device)
    if longest <= LONGEST_DECODE:
        paged_decode(*arguments, scores, longest, device, draft)
    else:
        paged_prefill(*arguments, scores, LONGEST_DECODE + 1, longest, device, draft)
        # Rows are missing from S * longest only if some sequence is shorter.
        if tokens < sequences * longest:
            paged_decode(*arguments, scores, LONGEST_DECODE, device, draft)
    return out
