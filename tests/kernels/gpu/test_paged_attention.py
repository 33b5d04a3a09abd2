"""The paged attention kernels against the reference: compiled if there is a GPU, else under Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.paged_samples import DEVICE, Batch, Heads, assert_attends, make_batch
from quantkit.kernels.gpu.attention.paged_args import AttentionArgs, ScoreParams
from quantkit.kernels.gpu.attention.paged_attention import paged_attention
from quantkit.kernels.gpu.attention.paged_decode import LONGEST_DECODE, paged_decode
from quantkit.kernels.gpu.attention.paged_plan import DECODE_ROWS

SCALE = 0.3
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: New tokens of two sequences: for one kernel, for the other, and for both.
STEPS = {"decode": [1, 1], "verify": [3, 8], "prefill": [33, 9], "mixed": [21, 1]}


@contextmanager
def _empty_is_nan() -> Iterator[None]:
    """`torch.empty` fills with NaN, which exposes what a kernel forgets to write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _assert_right(batch: Batch, **options: Any) -> None:
    with _empty_is_nan():
        out = paged_attention(*batch.tensors, scale=SCALE, **options)
    assert_attends(out, batch, scale=SCALE, **options)


def _sinks(heads: Heads) -> Tensor:
    return torch.linspace(-2, 3, heads.kv * heads.ratio, device=DEVICE)


def test_unwritten_results_would_be_seen() -> None:
    with _empty_is_nan():
        assert bool(torch.zeros(1).new_empty(5).isnan().all())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_tiles_span_blocks(block_size: int, step: str) -> None:
    _assert_right(make_batch([190, 70], STEPS[step], Heads(), block_size))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 128, 129])
def test_lengths_at_the_edges_of_blocks_and_tiles(length: int) -> None:
    _assert_right(make_batch([length, 40], [1, 1], Heads()))
    if length > LONGEST_DECODE:
        # The whole prompt at once, and its last tokens.
        _assert_right(make_batch([length, length], [length, 9], Heads(kv=1)))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", [Heads(2, 1), Heads(2, 3), Heads(1, 4), Heads(1, 8), Heads(3, 2), Heads(1, 7)], ids=str)
def test_head_ratios(heads: Heads, step: str) -> None:
    _assert_right(make_batch([70, 33], STEPS[step], heads))


@pytest.mark.parametrize("step", ["verify", "mixed"])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (33, 5), (24, 40)])
def test_head_dimensions(dim: int, value_dim: int, step: str) -> None:
    # 1 / sqrt(D) as in models, so that weights are spread over many keys for any head dimension.
    batch = make_batch([37, 70], STEPS[step], Heads(1, 3, dim, value_dim), 16, torch.float16)
    with _empty_is_nan():
        out = paged_attention(*batch.tensors, scale=dim**-0.5)
    assert_attends(out, batch, scale=dim**-0.5)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("window", [1, 5, 16, 63, 64, 65, 1000])
def test_windows(window: int, step: str) -> None:
    _assert_right(make_batch([200, 64], STEPS[step], Heads(1)), window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_soft_cap_and_sinks(step: str, dtype: torch.dtype) -> None:
    heads = Heads()
    batch = make_batch([100, 64], STEPS[step], heads, 16, dtype)
    if dtype == torch.float32:
        _assert_right(batch, softcap=1.5)
        _assert_right(batch, sinks=_sinks(heads))
    _assert_right(batch, softcap=0.7, window=40, sinks=_sinks(heads))


@pytest.mark.parametrize("sinks", [None, _sinks(Heads())], ids=["plain", "sinks"])
@pytest.mark.parametrize("count", [1, 5, 12])
def test_padding_is_zero(count: int, sinks: Tensor | None) -> None:
    # Unused sequences of a captured graph have rows but no context. Sequences without rows do not occur in eager steps.
    batch = make_batch([0, 40, 0, 150, 40], [count, count, count, count, 0], Heads())
    with _empty_is_nan():
        out = paged_attention(*batch.tensors, scale=SCALE, sinks=sinks)
    assert_attends(out, batch, scale=SCALE, sinks=sinks)
    for padding in (0, 2):
        assert not out[padding * count : (padding + 1) * count].any()


def test_no_rows() -> None:
    batch = make_batch([5], [0], Heads())
    assert paged_attention(*batch.tensors, scale=SCALE).shape == (0, 4, 16)


@pytest.mark.parametrize("step", STEPS)
def test_query_may_be_a_slice_of_a_fused_projection(step: str) -> None:
    batch = make_batch([70, 40], STEPS[step], Heads())
    fused = torch.full((len(batch.query), 9, 16), float("nan"), device=DEVICE)
    fused[:, 2:6] = batch.query
    _assert_right(replace(batch, query=fused[:, 2:6]))


@pytest.mark.parametrize("counts", [[1, 1, 1], [4, 8, 1]])
@pytest.mark.parametrize("splits", [1, 2, 5, 40])
def test_any_number_of_spans_gives_the_same(splits: int, counts: list[int]) -> None:
    # The last sequence fills only some of its spans; with 40 spans the merge takes more than one chunk.
    heads = Heads(1, 2)
    batch = make_batch([2300, 400, 3], counts, heads, 32, spare=300)
    out = torch.full_like(batch.query, float("nan"))
    with _empty_is_nan():
        call = AttentionArgs(*batch.tensors, _sinks(heads), out, ScoreParams.of(SCALE, 2200, 0.0))
        paged_decode(call, max(counts), {"rows": 16, "tokens": 16, "warps": 4, "stages": 2, "splits": splits})
    assert_attends(out, batch, scale=SCALE, window=2200, sinks=_sinks(heads))


def test_more_rows_than_a_tile_holds() -> None:
    heads = Heads(1, 23)
    assert 2 * DECODE_ROWS < 23 * 8
    _assert_right(make_batch([70, 20], [8, 2], heads))


@pytest.mark.parametrize("step", STEPS)
def test_longest_query_may_be_told(step: str) -> None:
    batch = make_batch([70, 40], STEPS[step], Heads())
    _assert_right(batch)
    told = paged_attention(*batch.tensors, scale=SCALE, max_query_len=max(STEPS[step]))
    assert_attends(told, batch, scale=SCALE)


def test_wrong_arguments_are_refused() -> None:
    batch = make_batch([20], [1], Heads())
    for wrong in (
        replace(batch, query=batch.query.half()),
        replace(batch, key_cache=batch.key_cache.transpose(1, 2)),
        replace(batch, seq_lens=batch.seq_lens.long()),
        replace(batch, query=batch.query[:, :3]),
    ):
        with pytest.raises(AssertionError):
            paged_attention(*wrong.tensors, scale=SCALE)
