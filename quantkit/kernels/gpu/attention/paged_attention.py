"""Attention over the paged KV cache: the entry point, which picks a kernel for each sequence and a config for each kernel."""

from collections.abc import Callable, Sequence
from functools import cache, partial

from torch import Tensor

from quantkit.kernels.autotune import Config, tuner
from quantkit.kernels.gpu.attention.paged_args import AttentionArgs, ScoreParams
from quantkit.kernels.gpu.attention.paged_decode import LONGEST_DECODE, paged_decode
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

    Sequences of up to 8 new tokens go to the decode kernel and longer ones to the prefill kernel. If a step has both, both
    kernels run, and each writes its rows.

    Args:
        query: [T, Hq, D] float16, bfloat16 or float32, on a CUDA device; any strides of rows and heads. Hq is a multiple of
            Hkv.
        key_cache: [num_blocks, block_size, Hkv, D], contiguous, in query's dtype or float8 e4m3; or a `QuantizedKV`.
            block_size is a power of two.
        value_cache: [num_blocks, block_size, Hkv, Dv], likewise.
        block_table: int32 [S, max_blocks]; what lies beyond a sequence's length is not read.
        query_start: int32 [S + 1], first row of each sequence; the last entry is T.
        seq_lens: int32 [S], tokens in the cache, the new ones included; 0 for padding, whose rows come out as zeros.
        scale, window, softcap, draft: as for the reference.
        sinks: float32 [Hq] or None.
        max_query_len: most new tokens of any sequence. If None, it is read from the device, which waits for the stream and
            cannot be captured in a CUDA graph.

    Returns:
        [T, Hq, Dv] in query's dtype; products are accumulated in float32.
    """
    (tokens, query_heads, _), sequences = query.shape, len(seq_lens)
    out = query.new_empty(tokens, query_heads, value_cache.shape[3])
    scores = ScoreParams.of(scale, window, softcap)
    args = AttentionArgs(query, key_cache, value_cache, block_table, query_start, seq_lens, sinks, out, scores, draft)
    args.check()
    if tokens == 0:
        return out
    longest = int(query_start.diff().max()) if max_query_len is None else max_query_len
    if longest <= LONGEST_DECODE:
        _decode(args, longest)
    else:
        _prefill(args, longest)
        # There are fewer than S * longest tokens only if some sequence is shorter than the longest.
        if tokens < sequences * longest:
            _decode(args, LONGEST_DECODE)
    return out


def _decode(args: AttentionArgs, longest: int) -> None:
    problem = Problem.of(args, longest, len(args.seq_lens))
    config = _best("paged_decode", args, problem, decode_configs(problem, device_of(args.query.device)), paged_decode)
    # `problem.new` is `longest` rounded up: otherwise a kernel would have to be compiled for each number of new tokens.
    paged_decode(args, problem.new, config)


def _prefill(args: AttentionArgs, longest: int) -> None:
    # An estimate of the number of prefilling sequences: those that decode add few tokens.
    problem = Problem.of(args, longest, max(1, len(args.query) // longest))
    launch = partial(paged_prefill, shortest=LONGEST_DECODE + 1)
    config = _best("paged_prefill", args, problem, prefill_configs(problem, device_of(args.query.device)), launch)
    launch(args, longest, config)


def _best(
    kernel: str,
    args: AttentionArgs,
    problem: Problem,
    configs: Sequence[Config],
    launch: Callable[[AttentionArgs, int, Config], None],
) -> Config:
    @cache
    def example() -> AttentionArgs:
        return problem.example(args)

    return tuner(args.query.device).best(kernel, problem, configs, lambda config: launch(example(), problem.new, config))
