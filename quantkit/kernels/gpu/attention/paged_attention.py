"""Attention over the paged KV cache: which kernel takes which sequence, and with which config."""

from collections.abc import Callable, Sequence
from functools import cache, partial

from torch import Tensor

from quantkit.kernels.autotune import Config, tuner
from quantkit.kernels.gpu.attention.paged_decode import LONGEST_DECODE, paged_decode
from quantkit.kernels.gpu.attention.paged_launch import Call, Scores
from quantkit.kernels.gpu.attention.paged_plan import Problem, decode_configs, device_of, prefill_configs
from quantkit.kernels.gpu.attention.paged_prefill import paged_prefill
from quantkit.kernels.layouts.quantized_kv import Cache


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
        key_cache: [num_blocks, block_size, Hkv, D], contiguous, in query's dtype or float8 e4m3; or a `QuantizedKV`.
            block_size is a power of two.
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
    (tokens, query_heads, _), sequences = query.shape, len(seq_lens)
    out = query.new_empty(tokens, query_heads, value_cache.shape[3])
    scores = Scores.of(scale, window, softcap)
    call = Call(query, key_cache, value_cache, block_table, query_start, seq_lens, sinks, out, scores, draft)
    call.check()
    if tokens == 0:
        return out
    longest = int(query_start.diff().max()) if max_query_len is None else max_query_len
    if longest <= LONGEST_DECODE:
        _decode(call, longest)
    else:
        _prefill(call, longest)
        # Rows are missing from S * longest only if some sequence is shorter.
        if tokens < sequences * longest:
            _decode(call, LONGEST_DECODE)
    return out


def _decode(call: Call, longest: int) -> None:
    problem = Problem.of(call, longest, len(call.seq_lens))
    config = _best("paged_decode", call, problem, decode_configs(problem, device_of(call.query.device)), paged_decode)
    # So many new tokens, and not `longest`: a kernel for each number would have to be compiled.
    paged_decode(call, problem.new, config)


def _prefill(call: Call, longest: int) -> None:
    # Sequences that decode meanwhile do not count.
    problem = Problem.of(call, longest, max(1, len(call.query) // longest))
    launch = partial(paged_prefill, shortest=LONGEST_DECODE + 1)
    config = _best("paged_prefill", call, problem, prefill_configs(problem, device_of(call.query.device)), launch)
    launch(call, longest, config)


def _best(
    kernel: str, call: Call, problem: Problem, configs: Sequence[Config], launch: Callable[[Call, int, Config], None]
) -> Config:
    @cache
    def example() -> Call:
        return problem.example(call)

    return tuner(call.query.device).best(kernel, problem, configs, lambda config: launch(example(), problem.new, config))
