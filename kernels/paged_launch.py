"""How the paged kernels are launched: scores as exponents of 2, the shape of a tile, and what they rely on."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.kv_store import Cache, Store, planes
from quantkit.kernels.paged_tile import LOG2E

#: Least tiles worth a program of its own: writing and merging a span costs about as much as reading a quarter of a tile.
MIN_TILES = tl.constexpr(2)

#: Programs wanted on each multiprocessor: two fit at a time, and twice as many even out sequences of unequal length.
PROGRAMS_PER_PROCESSOR = 4

#: A window that hides nothing; small enough that position - window does not overflow int32.
NO_WINDOW = 1 << 30


@dataclass(frozen=True)
class Scores:
    """How raw dot products become exponents of 2: x * scale, or cap * (1 - 2 / (1 + exp2(x * scale))) = cap * tanh(..)."""

    scale: float
    cap: float
    window: int

    @classmethod
    def of(cls, scale: float, window: int, softcap: float) -> "Scores":
        """From the arguments of `paged_attention`."""
        window = window if window > 0 else NO_WINDOW
        if softcap > 0:
            return cls(2 * LOG2E.value * scale / softcap, LOG2E.value * softcap, window)
        return cls(LOG2E.value * scale, 0.0, window)


@dataclass(frozen=True)
class Device:
    """What the shape of a launch depends on.

    Attributes:
        capability: of the compute architecture, 80 for sm_80. From 90 on, matrix units take operands from shared memory.
        processors: number of multiprocessors.
        shared_memory: bytes that one program may have.
    """

    capability: int
    processors: int
    shared_memory: int


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        rows, tokens: of a tile of scores; powers of two.
        dim, value_dim: head dimensions padded to powers of two, 16 at least.
        stages: the block table is read stages - 1 tiles ahead, the caches (stages - 1) / 2.
    """

    rows: int
    tokens: int
    dim: int
    value_dim: int
    stages: int

    @classmethod
    def of(cls, query: Tensor, value_dim: int, rows: int, most_rows: int, least: int, most: int, shared_memory: int) -> "Tile":
        """About 32 KiB of keys and values, but `least` to `most` tokens; `rows`, or fewer where heads are wider than 128; two
        such tiles in flight where `shared_memory` has room for them, one otherwise.

        float32 is there to be right, not fast: it gets the largest tile whose products do not spill.
        """
        size = query.element_size()
        dim, value_dim = (max(16, triton.next_power_of_2(dim)) for dim in (query.shape[2], value_dim))
        rows = max(16, min(rows, most_rows, most_rows * 128 // max(dim, value_dim)))
        token = 2 * max(dim, value_dim) * size
        if size == 4:
            return cls(min(rows, 32), max(16, min(64, 16384 // token)), dim, value_dim, 2)
        tokens = max(least, min(most, 32768 // token))
        # A third buffer is for the tile that Hopper's matrix unit may still be reading; the rest is the query and the weights.
        buffers = 3 if rows >= 64 else 2
        needed = buffers * tokens * token + rows * (dim + tokens) * size
        return cls(rows, tokens, dim, value_dim, 5 if needed <= shared_memory else 3)

    def narrow(self, rows: int, tokens: int) -> "Tile":
        """The tile for a quantized cache, of which codes, parameters and numbers are in registers at once: at most so many
        rows and tokens, one tile in flight."""
        return Tile(min(self.rows, rows), min(self.tokens, tokens), self.dim, self.value_dim, 2)


def check(
    query: Tensor,
    key_cache: Cache,
    value_cache: Cache,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
) -> None:
    """Assert the shapes, dtypes and layouts that `reference.paged_attention` documents and the kernels rely on."""
    (sequences, _), block_size = block_table.shape, key_cache.shape[1]
    assert query.shape[2] == key_cache.shape[3], (query.shape, key_cache.shape)
    assert query.shape[1] % key_cache.shape[2] == 0, (query.shape, key_cache.shape)
    assert key_cache.shape[:3] == value_cache.shape[:3], (key_cache.shape, value_cache.shape)
    assert block_size & (block_size - 1) == 0, block_size
    for cache in (key_cache, value_cache):
        assert all(plane.is_contiguous() for plane in planes(cache))
        assert isinstance(cache, Store) or cache.dtype in (query.dtype, torch.float8_e4m3fn), (query.dtype, cache.dtype)
    assert all(x.stride(-1) == 1 for x in (query, block_table, query_start, seq_lens))
    assert (len(query_start), len(seq_lens)) == (sequences + 1, sequences)
    assert block_table.dtype == query_start.dtype == seq_lens.dtype == torch.int32
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == query.shape[1:2] and sinks.is_contiguous())


def number_of_splits(programs: int, tokens: int, tile: int, processors: int) -> int:
    """Spans into which to cut every sequence.

    Args:
        programs: (sequence, KV head, row tile) triples, which run side by side anyhow.
        tokens: most that a sequence can see.
        tile: tokens of a tile.
        processors: multiprocessors of the device.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // programs)
    useful = -(-tokens // (tile * int(MIN_TILES.value)))
    return max(1, min(wanted, useful))
