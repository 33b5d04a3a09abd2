"""Quantized caches for the tests of attention, with the same tokens as a plain one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from helpers.paged_samples import Batch, Heads, make_batch
from quantkit.kernels import reference
from quantkit.kernels.layouts.quantized_kv import QuantizedKV

#: Names of the schemes; "int4+4" is 4+4 bit.
SCHEMES = ("int8", "int4", "int4+4")

#: Factor of the scores.
SCALE = 0.3


def make_quantized_kv(
    scheme: str, num_blocks: int, block_size: int, heads: int, dim: int, *, keys: bool, device: str = "cpu", pages: Tensor
) -> QuantizedKV:
    """An empty quantized cache. Bytes that are never written show up in results: codes are 0xff, scales and tail pages NaN."""

    def full(*shape: int, value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    nan = float("nan")
    if scheme == "int8":
        codes = full(num_blocks, block_size, heads, dim, value=255, dtype=torch.uint8)
        return QuantizedKV(codes, full(num_blocks, block_size, heads, 2, value=nan, dtype=torch.float16))
    codes = full(num_blocks, block_size, heads, dim // 2, value=255, dtype=torch.uint8)
    shape = (num_blocks, heads, 2, dim) if keys else (num_blocks, block_size, heads, 2)
    return QuantizedKV(
        codes,
        full(*shape, value=nan, dtype=torch.float16),
        by_channel=keys,
        lower=codes.clone() if scheme == "int4+4" else None,
        tail_pages=full(int(pages.max()) + 1, block_size, heads, dim, value=nan, dtype=torch.bfloat16),
        tail_page_ids=pages,
    )


@dataclass(frozen=True)
class Quantized:
    """A batch on plain caches, and quantized caches with the same tokens."""

    batch: Batch
    keys: QuantizedKV
    values: QuantizedKV

    @property
    def tensors(self) -> tuple[Tensor, QuantizedKV, QuantizedKV, Tensor, Tensor, Tensor]:
        """The arguments of `paged_attention`, with quantized caches."""
        b = self.batch
        return (b.query, self.keys, self.values, b.block_table, b.query_start, b.seq_lens)


def make_quantized(scheme: str, lengths: list[int], counts: list[int], heads: Heads, block_size: int = 16) -> Quantized:
    """`paged_samples.make_batch`, and quantized caches of its tokens, written by the reference; each block has a tail page."""
    batch = make_batch(lengths, counts, heads, block_size)
    num_blocks = len(batch.key_cache)
    pages = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).int().to(batch.query.device)
    common: dict[str, Any] = {"device": str(batch.query.device), "pages": pages}
    keys = make_quantized_kv(scheme, num_blocks, block_size, heads.kv, heads.dim, keys=True, **common)
    values = make_quantized_kv(scheme, num_blocks, block_size, heads.kv, heads.value_dim, keys=False, **common)
    slots = slots_of(batch)
    key, value = (cache.flatten(0, 1)[slots] for cache in (batch.key_cache, batch.value_cache))
    reference.kv_write(key, value, keys, values, slots)
    return Quantized(batch, keys, values)


def assert_right(attention: Callable[..., Tensor], case: Quantized, **options: Any) -> None:
    """Assert that `attention` gives the reference's result. In float32, dequantization is exact (8-bit codes times 11-bit
    scales); sums differ in their order."""
    found = attention(*case.tensors, scale=SCALE, **options)
    wanted = reference.paged_attention(case.batch.query.double(), *case.tensors[1:], scale=SCALE, **options)
    assert bool(wanted.isfinite().all())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)


def slots_of(batch: Batch) -> Tensor:
    """Slots of all tokens, int64, sequence after sequence."""
    size = batch.key_cache.shape[1]
    table, lengths = batch.block_table.long().cpu(), batch.seq_lens.tolist()
    slots = [table[s, t // size] * size + t % size for s, length in enumerate(lengths) for t in range(length)]
    return torch.stack(slots).to(batch.query.device)


def empty_like(store: QuantizedKV) -> QuantizedKV:
    """A cache of the same shape and with the same tail pages, with nothing written."""
    fresh: dict[str, Any] = {
        name: None if (found := getattr(store, name)) is None else torch.full_like(found, value)
        for name, value in (("codes", 255), ("lower", 255), ("params", float("nan")), ("tail_pages", float("nan")))
    }
    return replace(store, **fresh)
