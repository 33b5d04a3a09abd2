"""The reference of paged attention against torch's and transformers' attention in float64, with which it must agree."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from helpers.paged_samples import DEVICE, Batch, Heads, make_batch
from quantkit.kernels import reference

SCALE = 0.4
LENGTHS, COUNTS = [37, 16, 20, 1], [37, 5, 1, 1]
HEADS = Heads(2, 3, 8, 12)


def _batch(lengths: list[int] = LENGTHS, counts: list[int] = COUNTS) -> Batch:
    return make_batch(lengths, counts, HEADS, block_size=8, dtype=torch.float64)


def _dense(batch: Batch, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence's query [1, Hq, n, D], keys [1, Hkv, L, D] and values [1, Hkv, L, Dv], token by token."""
    block_size = batch.key_cache.shape[1]
    places = [divmod(token, block_size) for token in range(int(batch.seq_lens[sequence]))]
    table = batch.block_table[sequence].tolist()
    keys = torch.stack([batch.key_cache[table[block], offset] for block, offset in places])
    values = torch.stack([batch.value_cache[table[block], offset] for block, offset in places])
    query = batch.query[batch.query_start[sequence] : batch.query_start[sequence + 1]]
    query, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))
    return query, keys, values


def _visible(count: int, length: int, window: int) -> Tensor:
    """Mask [count, length] by definition: whether the query at position p = length - count + i sees key j."""
    seen = [[j <= p and (window == 0 or j > p - window) for j in range(length)] for p in range(length - count, length)]
    return torch.tensor(seen, device=DEVICE)


def _assert_each_sequence(batch: Batch, out: Tensor, window: int, attention: Any) -> None:
    for sequence, (length, count) in enumerate(zip(LENGTHS, COUNTS, strict=True)):
        wanted = attention(*_dense(batch, sequence), _visible(count, length, window))
        rows = slice(int(batch.query_start[sequence]), int(batch.query_start[sequence + 1]))
        torch.testing.assert_close(out[rows], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [0, 1, 7, 100])
def test_agrees_with_torch(window: int) -> None:
    def torchs(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(query, keys, values, attn_mask=visible, scale=SCALE, enable_gqa=True)[0].transpose(0, 1)

    batch = _batch()
    out = reference.paged_attention(*batch.tensors, scale=SCALE, window=window)
    _assert_each_sequence(batch, out, window, torchs)


@pytest.mark.parametrize("window", [0, 7])
def test_agrees_with_gemmas_soft_cap(window: int) -> None:
    module = SimpleNamespace(num_key_value_groups=HEADS.ratio, training=False)

    def gemmas(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        mask = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, float("-inf"))
        return modeling_gemma2.eager_attention_forward(module, query, keys, values, mask, scaling=SCALE, softcap=1.5)[0][0]

    batch = _batch()
    out = reference.paged_attention(*batch.tensors, scale=SCALE, window=window, softcap=1.5)
    for sequence in range(len(LENGTHS)):
        # Gemma's softmax runs in float32.
        wanted = gemmas(*_dense(batch, sequence), _visible(COUNTS[sequence], LENGTHS[sequence], window))
        rows = slice(int(batch.query_start[sequence]), int(batch.query_start[sequence + 1]))
        torch.testing.assert_close(out[rows], wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [0, 7])
def test_agrees_with_gpt_oss_sinks(window: int) -> None:
    sinks = torch.linspace(-2, 2, HEADS.kv * HEADS.ratio, dtype=torch.float64, device=DEVICE)
    module = SimpleNamespace(num_key_value_groups=HEADS.ratio, training=False, sinks=sinks)

    def gpt_oss(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        mask = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, float("-inf"))
        return modeling_gpt_oss.eager_attention_forward(module, query, keys, values, mask, scaling=SCALE)[0][0]

    batch = _batch()
    out = reference.paged_attention(*batch.tensors, scale=SCALE, window=window, sinks=sinks)
    _assert_each_sequence(batch, out, window, gpt_oss)


def test_padding_is_zero() -> None:
    batch = _batch([0, 9, 2], [3, 1, 4])
    for sinks in (None, torch.ones(6, device=DEVICE)):
        out = reference.paged_attention(*batch.tensors, scale=SCALE, sinks=sinks)
        assert not out[:3].any()
        # Two of four rows are before the sequence's first token.
        assert not out[4:6].any()
        assert bool(out[3].all())
        assert bool(out[6:].all())
        assert bool(out.isfinite().all())


def test_result_has_the_querys_dtype_and_float32_precision() -> None:
    exact = _batch()
    half = replace(exact, query=exact.query.half(), key_cache=exact.key_cache.half(), value_cache=exact.value_cache.half())
    out = reference.paged_attention(*half.tensors, scale=SCALE)
    assert out.dtype == torch.float16
    widened = replace(
        half, query=half.query.double(), key_cache=half.key_cache.double(), value_cache=half.value_cache.double()
    )
    # Only the rounding of the result remains: half an epsilon; float32's error may push it over a tie.
    torch.testing.assert_close(out.double(), reference.paged_attention(*widened.tensors, scale=SCALE), rtol=5.1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 5, 24, device=DEVICE).to(dtype), torch.linspace(0.5, 2, 24, device=DEVICE).to(dtype)
    wanted = torch.nn.functional.rms_norm(x.double(), (24,), weight.double(), 1e-5)
    found = reference.rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), wanted, rtol=0.51 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )
