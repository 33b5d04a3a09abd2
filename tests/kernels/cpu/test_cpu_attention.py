"""CPU attention and cache writes against the reference. What must not be read is NaN or points outside (see paged_samples)."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.native_cases import kernels, threads  # noqa: F401
from helpers.paged_samples import Batch, Heads, assert_attends, make_batch
from quantkit.kernels import reference
from quantkit.kernels.cpu import attention as cpu_attention
from quantkit.kernels.cpu import library

SCALE = 0.3
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

#: New tokens of two sequences: work split over the keys, whole prompts, both in one batch.
STEPS = {"decode": [1, 1], "verify": [3, 8], "prefill": [33, 60], "mixed": [21, 1]}

pytestmark = pytest.mark.usefixtures("kernels")


def _batch(*arguments: Any, **options: Any) -> Batch:
    batch = make_batch(*arguments, **options)
    return Batch(*(getattr(batch, field.name).cpu() for field in fields(batch)))


def _attend(batch: Batch, **options: Any) -> Tensor:
    return cpu_attention.paged_attention(*batch.tensors, scale=SCALE, **options)


def _assert_right(batch: Batch, **options: Any) -> None:
    assert_attends(_attend(batch, **options), batch, scale=SCALE, **options)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_and_cache_types(dtype: torch.dtype, step: str) -> None:
    _assert_right(_batch([600, 70], STEPS[step], Heads(), dtype=dtype))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 513])
def test_lengths_at_the_edges_of_blocks_chunks_and_spans(length: int) -> None:
    _assert_right(_batch([length, 40], [1, 1], Heads()))
    _assert_right(_batch([length, length], [length, min(length, 9)], Heads(kv=1)))


@pytest.mark.parametrize("block_size", [1, 4, 32, 128])
def test_block_sizes(block_size: int) -> None:
    _assert_right(_batch([190, 70], [33, 1], Heads(), block_size))


@pytest.mark.parametrize(
    "heads",
    [Heads(1, 1, 64, 64), Heads(3, 3, 64, 64), Heads(2, 4, 80, 48), Heads(1, 30, 20, 36), Heads(5, 1, 128, 256)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads(dtype: torch.dtype, heads: Heads) -> None:
    _assert_right(_batch([140, 75, 20], [1, 30, 2], heads, dtype=dtype))


@pytest.mark.parametrize("window", [1, 2, 16, 63, 64, 65, 300, 1000])
@pytest.mark.parametrize("step", STEPS)
def test_windows(step: str, window: int) -> None:
    _assert_right(_batch([600, 70], STEPS[step], Heads(), dtype=torch.bfloat16), window=window)


@pytest.mark.parametrize("step", STEPS)
def test_softcap_and_sinks(step: str) -> None:
    batch = _batch([600, 70], STEPS[step], Heads())
    _assert_right(batch, softcap=2.0)
    _assert_right(batch, sinks=torch.linspace(-2, 3, 4))
    _assert_right(batch, softcap=5.0, window=40, sinks=torch.linspace(-2, 30, 4))


def test_scores_far_apart() -> None:
    """Weights underflow and the maximum moves from chunk to chunk."""
    batch = _batch([300], [5], Heads())
    _assert_right(replace(batch, query=batch.query * 100))


def test_padding_sees_nothing() -> None:
    batch = _batch([40, 30], [1, 1], Heads())
    lengths = torch.tensor([40, 0], dtype=torch.int32)
    out = _attend(replace(batch, seq_lens=lengths))
    assert torch.equal(out[0], _attend(batch)[0])
    assert not out[1].any()


def test_a_query_depends_on_nothing_but_its_sequence(kernels: str, threads: int) -> None:  # noqa: F811
    """The last token of a prompt has the same result with the prompt, alone, and in a batch."""
    if kernels == "torch":
        pytest.skip("torch's products may depend on their shapes")
    both = _batch([600, 600], [1, 30], Heads(3, 3, 64, 64), dtype=torch.bfloat16)
    whole = _attend(both)
    torch.set_num_threads(1)
    second = replace(both, block_table=both.block_table[1:], seq_lens=both.seq_lens[1:])
    last = replace(second, query=both.query[-1:], query_start=torch.tensor([0, 1], dtype=torch.int32))
    assert torch.equal(_attend(last)[0], whole[-1])
    few = replace(second, query=both.query[-4:], query_start=torch.tensor([0, 4], dtype=torch.int32))
    assert torch.equal(_attend(few), whole[-4:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "value_dim"), [(1, 64, 64), (3, 16, 24), (5, 33, 7), (1, 1, 1)])
def test_writes_what_the_oracle_writes(heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    slots = torch.tensor([39, 0, -1, 7, 12, -1, 1])
    key, value = torch.randn(7, heads, dim), torch.randn(7, heads, value_dim)
    found, wanted = ([torch.full((5, 8, heads, width), 99.0, dtype=dtype) for width in (dim, value_dim)] for _ in range(2))
    cpu_attention.kv_write(key.to(dtype), value.to(dtype), found[0], found[1], slots)
    reference.kv_write(key.to(dtype), value.to(dtype), wanted[0], wanted[1], slots)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_are_rounded_as_torch_rounds(kernels: str, dtype: torch.dtype) -> None:  # noqa: F811
    """Ties, subnormals, the largest numbers, infinity: all 16-bit numbers, their neighbours and the midpoints between them."""
    if kernels == "torch":
        pytest.skip("torch itself")
    every = torch.arange(1 << 16).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    steps = torch.cat([every, every.nextafter(torch.tensor(9e9)), (every + every.roll(1)) / 2, torch.tensor([9e9, torch.inf])])
    cache = torch.zeros(1, 1, 1, len(steps), dtype=dtype)
    cpu_attention.kv_write(steps[None, None], steps[None, None], cache, cache.clone(), torch.tensor([0]))
    assert torch.equal(cache[0, 0, 0], steps.to(dtype))


def test_native_kernels_are_what_is_tested(kernels: str) -> None:  # noqa: F811
    assert (library.load() is not None) == (kernels == "native")
