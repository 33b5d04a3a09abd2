"""The launch that the decode and the prefill kernel share."""

from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.autotune import Config
from quantkit.kernels.gpu.attention.paged_args import AttentionArgs
from quantkit.kernels.gpu.attention.paged_plan import padded_dim
from quantkit.kernels.gpu.attention.paged_quantized import cache_kind
from quantkit.kernels.gpu.common import computes_in_float32
from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV


def launch(
    kernel: Any, grid: tuple[int, ...], args: AttentionArgs, config: Config, *further: Tensor, **constants: int
) -> None:
    """Run a paged kernel.

    Args:
        kernel: a Triton kernel whose first arguments are those below.
        grid: of programs.
        args: see `AttentionArgs`.
        config: see `paged_plan`.
        further: the kernel's arguments after the shared ones.
        constants: the kernel's constexprs other than the shared ones.
    """
    query, scores = args.query, args.scores
    (_, block_size, heads, dim), value_dim = args.key_cache.shape, args.value_cache.shape[3]
    key_data, key_params, key_lower, key_tail = _tensors(args.key_cache, args.draft)
    value_data, value_params, value_lower, value_tail = _tensors(args.value_cache, args.draft)
    kernel[grid](
        query,
        key_data,
        value_data,
        key_params,
        value_params,
        key_lower,
        value_lower,
        key_tail,
        value_tail,
        args.key_cache.tail_page_ids if isinstance(args.key_cache, QuantizedKV) else None,
        args.block_table,
        args.query_start,
        args.seq_lens,
        args.sinks,
        args.out,
        query.stride(0),
        query.stride(1),
        args.block_table.stride(0),
        scores.scale,
        scores.cap,
        scores.window,
        *further,
        HEADS=heads,
        RATIO=args.ratio,
        ROWS=config["rows"],
        BLOCK_SIZE=block_size,
        TILE=config["tokens"],
        D=dim,
        D_PAD=padded_dim(dim),
        DV=value_dim,
        DV_PAD=padded_dim(value_dim),
        CAPPED=scores.cap > 0,
        SINKS=args.sinks is not None,
        KIND=cache_kind(args.key_cache),
        WIDEN=computes_in_float32(query),
        num_warps=config["warps"],
        num_stages=config["stages"],
        **constants,
    )


def _tensors(cache: Cache, draft: bool) -> tuple[Tensor | None, ...]:
    """Data, parameters, lower 4 bits and tail pages; None for what the cache lacks or a draft does not read."""
    if isinstance(cache, Tensor):
        return (cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache), None, None, None
    return cache.codes, cache.params, None if draft else cache.lower, cache.tail_pages
