"""Paged batches for the tests of attention, and a comparison with the reference."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Heads:
    """Number of KV heads, query heads per KV head, and head dimensions of keys and values."""

    kv: int = 2
    ratio: int = 2
    dim: int = 16
    value_dim: int = 16


@dataclass(frozen=True)
class Batch:
    """The tensors that `paged_attention` takes, in its order."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (self.query, self.key_cache, self.value_cache, self.block_table, self.query_start, self.seq_lens)


def make_batch(
    lengths: list[int],
    counts: list[int],
    heads: Heads,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    spare: int = 1,
) -> Batch:
    """Sequences of `lengths` tokens, the last `counts` of which are new, in unordered blocks.

    What must not be read is poisoned: slots without a token are NaN; the last `spare` columns of the block table, and the
        unused
    entries of its rows, point far outside the caches.
    """
    generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))
    used = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(used) + 2, generator=generator)
    table = torch.full((len(lengths), max(used) + spare), 1 << 30, dtype=torch.int32)
    shape = (len(order) * block_size, heads.kv)
    keys = torch.full((*shape, heads.dim), float("nan"), dtype=dtype)
    values = torch.full((*shape, heads.value_dim), float("nan"), dtype=dtype)
    for sequence, length in enumerate(lengths):
        blocks = order[sum(used[:sequence]) :][: used[sequence]]
        table[sequence, : len(blocks)] = blocks
        tokens = torch.arange(length)
        slots = blocks[tokens // block_size] * block_size + tokens % block_size
        keys[slots] = torch.randn(length, heads.kv, heads.dim, generator=generator).to(dtype)
        values[slots] = torch.randn(length, heads.kv, heads.value_dim, generator=generator).to(dtype)
    query = torch.randn(sum(counts), heads.kv * heads.ratio, heads.dim, generator=generator).to(dtype)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    batch = (query, keys.unflatten(0, (-1, block_size)), values.unflatten(0, (-1, block_size)), table, starts)
    return Batch(*(x.to(DEVICE) for x in (*batch, torch.tensor(lengths, dtype=torch.int32))))


def assert_attends(out: Tensor, batch: Batch, **options: object) -> None:
    """Assert that `out` is what the reference computes in float64, up to rounding.

    The kernels round each softmax weight to the values' dtype, which is off by at most u * sum(weight * |value|), where u is
    half the dtype's epsilon; then they round the result. Triton's interpreter truncates bfloat16 there: another 2 u |out|.
    Products are summed in float32: a few hundred terms near 1 stay well within 1e-5.
    """
    assert out.dtype == batch.query.dtype
    exact = replace(
        batch,
        query=batch.query.double(),
        key_cache=batch.key_cache.double(),
        value_cache=batch.value_cache.double(),
    )
    wanted = reference.paged_attention(*exact.tensors, **options)  # type: ignore[arg-type]
    size = reference.paged_attention(*replace(exact, value_cache=exact.value_cache.abs()).tensors, **options)  # type: ignore[arg-type]
    assert bool(wanted.isfinite().all())
    bound = 3 * torch.finfo(out.dtype).eps / 2 * size + 1e-5
    worst = ((out.double() - wanted).abs() / bound).max()
    # Written so that NaN fails.
    assert bool(worst <= 1), f"{float(worst):.2f} times the rounding error allowed"
