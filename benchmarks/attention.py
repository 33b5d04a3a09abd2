"""Time paged attention on a GPU against torch's scaled_dot_product_attention: one layer, with the heads of Llama 3 8B and 70B.

Terms: us = median time of one call, replayed from a CUDA graph with the L2 cache flushed before each call
(triton.testing.do_bench). GB/s = bytes of the sequences' keys and values, each counted once, per us. of copy = GB/s, as a
fraction of the bandwidth (read + written) of copying 1 GiB on the same device. TFLOP/s = 4 D Hq x (query, key) pairs that the
causal mask leaves, per us. sdpa us = time of torch's function on the same numbers, stored contiguously, which no serving
engine does. new = new tokens per sequence. context = tokens per sequence in the cache, the new ones included. Results are
compared before they are timed. Configs are tuned on first use and kept under $QUANTKIT_CACHE.

usage: python -m benchmarks.attention [--dtype bfloat16] [--json FILE]
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HEADS = {"llama-8b": (32, 8, 128), "llama-70b": (64, 8, 128)}  # query heads, KV heads, head dimension
BLOCK_SIZE = 16
#: (new tokens, sequences, context)
DECODE = [(new, batch, context) for new in (1, 5) for batch in (1, 8, 32, 128) for context in (1024, 4096, 32768)]
PREFILL = [(512, 1, 512), (2048, 1, 2048), (8192, 1, 8192), (512, 8, 512), (512, 1, 8192), (2048, 1, 32768)]
MOST_TOKENS = 1 << 20  # in the cache, over all sequences: 4 GiB of keys and values, and as much for the dense copy

Row = dict[str, str | int | float]


@dataclass(frozen=True)
class Case:
    """One layer's inputs, paged and dense."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    new: int

    def paged(self) -> Tensor:
        """[T, Hq, D] from the Triton kernels."""
        from quantkit.kernels.gpu.attention.paged_attention import paged_attention

        tensors = (self.query, self.key_cache, self.value_cache, self.block_table, self.query_start, self.seq_lens)
        return paged_attention(*tensors, scale=self.query.shape[2] ** -0.5, max_query_len=self.new)

    def dense(self) -> Callable[[], Tensor]:
        """A call that computes the same in torch, [S, Hq, new, D], on contiguous copies that are made beforehand."""
        sequences, context = len(self.seq_lens), int(self.seq_lens[0])
        table = self.block_table.long()
        keys, values = (
            cache[table].flatten(1, 2).transpose(1, 2).contiguous() for cache in (self.key_cache, self.value_cache)
        )
        query = self.query.unflatten(0, (sequences, self.new)).transpose(1, 2).contiguous()
        causal = {"is_causal": self.new == context} if self.new in (1, context) else {"attn_mask": self._mask(context)}
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda: sdpa(query, keys, values, enable_gqa=True, **causal)

    def _mask(self, context: int) -> Tensor:
        position = torch.arange(context - self.new, context, device=self.query.device)
        return torch.arange(context, device=self.query.device) <= position[:, None]


def make_case(heads: tuple[int, int, int], new: int, batch: int, context: int, dtype: torch.dtype, device: str) -> Case:
    """Random numbers in randomly ordered blocks; `context` is a multiple of the block size."""
    query_heads, kv_heads, dim = heads
    blocks = batch * context // BLOCK_SIZE
    caches = torch.randn(2, blocks, BLOCK_SIZE, kv_heads, dim, dtype=dtype, device=device)
    query = torch.randn(batch * new, query_heads, dim, dtype=dtype, device=device)
    table = torch.randperm(blocks, device=device).int().view(batch, -1)
    starts = torch.arange(0, batch * new + 1, new, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    return Case(query, caches[0], caches[1], table, starts, lengths, new)


def assert_same(case: Case) -> None:
    """Assert that the kernels and torch agree up to the rounding of 16-bit weights and results."""
    dense = case.dense()().transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(case.paged(), dense, rtol=2e-2, atol=2e-2)


def microseconds(call: Callable[[], object]) -> float:
    """Median time of `call`, replayed from a CUDA graph with a cold L2 cache."""
    import triton.testing

    for _ in range(3):  # compile and warm up outside the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return 1000 * float(triton.testing.do_bench(graph.replay, return_mode="median"))


def copy_bandwidth() -> float:
    """Bandwidth of a copy of 1 GiB: GB/s read plus written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e3 / microseconds(lambda: target.copy_(source))


def measure(name: str, new: int, batch: int, context: int, dtype: torch.dtype, copy: float) -> Row:
    """Measure one row of the table; `copy` is the device's copy bandwidth in GB/s."""
    query_heads, kv_heads, dim = HEADS[name]
    case = make_case(HEADS[name], new, batch, context, dtype, "cuda")
    assert_same(case)
    paged, sdpa = microseconds(case.paged), microseconds(case.dense())
    rate = 2 * batch * context * kv_heads * dim * dtype.itemsize / 1e3 / paged
    pairs = batch * (new * context - new * (new - 1) // 2)
    return {
        "operation": "paged attention",
        "heads": name,
        "new": new,
        "batch": batch,
        "context": context,
        "dtype": str(dtype).removeprefix("torch."),
        "us": round(paged, 2),
        "GB/s": round(rate, 1),
        "of copy": round(rate / copy, 3),
        "TFLOP/s": round(4 * dim * query_heads * pairs / 1e6 / paged, 2),
        "sdpa us": round(sdpa, 2),
        "times sdpa": round(sdpa / paged, 2),
    }


def rows(dtype: torch.dtype, copy: float) -> Iterator[Row]:
    """The rows, each as soon as it is measured; `copy` is the device's copy bandwidth in GB/s."""
    for name in HEADS:
        for new, batch, context in DECODE + PREFILL:
            if batch * context <= MOST_TOKENS:
                yield measure(name, new, batch, context, dtype, copy)


def main() -> None:
    """Print each row when it is measured, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.attention: no CUDA device; run it on a machine with an NVIDIA GPU", file=sys.stderr)
        raise SystemExit(2)
    copy = copy_bandwidth()
    found = []
    for row in rows(getattr(torch, options.dtype), copy):
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        found.append(row)
    report = json.dumps({"device": torch.cuda.get_device_name(), "copy GB/s": round(copy, 1), "rows": found}, indent=1)
    print(report)
    if options.json:
        options.json.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
