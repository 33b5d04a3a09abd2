"""How the paged kernels divide a problem: the tile of a program, the spans of a sequence, and the configs worth timing.

A config has `rows` and `tokens`, the size of a tile of scores; `warps`; `stages`, where the block table is prefetched stages -
1 iterations ahead and the caches half of that; and for decoding `splits`, the spans per sequence. The first config is an
estimate, which is used if nothing can be timed. The others were compiled for sm_80 and sm_90, and those that spill registers
were left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantkit.kernels.autotune import Config
from quantkit.kernels.gpu.attention.paged_args import AttentionArgs
from quantkit.kernels.gpu.attention.paged_quantized import FP8, INT4, PLAIN, cache_kind
from quantkit.kernels.gpu.common import interpreted

#: The fewest tiles worth a separate program: writing and merging a span costs about as much as reading a quarter of a tile.
MIN_TILES = tl.constexpr(2)

#: Programs wanted per multiprocessor: two fit at a time, and twice as many even out sequences of unequal length.
PROGRAMS_PER_PROCESSOR = 4

#: The most rows of a tile. When decoding, more rows (multi-query attention with many heads and a draft) take several programs.
#: When prefilling, it is what Hopper's matrix units take from two groups of four warps.
DECODE_ROWS, PREFILL_ROWS = 64, 128

#: Contexts are rounded up to one of these for timing.
_CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 16)

#: The largest problem that is timed: sequences, new tokens per sequence and in total, tokens of all contexts. Larger problems
#: only repeat the same work.
_SEQUENCES, _NEW, _ALL_NEW, _TOKENS = 256, 1 << 10, 1 << 13, 1 << 20

#: Tiles to time in addition to the estimate, by head dimension (64: up to 64): most rows, tokens, warps, stages.
_DECODE = {
    64: [(64, 64, 4, 5), (64, 128, 8, 5), (64, 256, 4, 3)],
    128: [(64, 128, 4, 3), (64, 128, 8, 5), (64, 64, 8, 5), (64, 32, 4, 5)],
    256: [(64, 64, 8, 3), (64, 32, 8, 5)],
}
_PREFILL = {
    64: [(64, 64, 4, 5), (128, 128, 8, 5), (64, 128, 4, 5)],
    128: [(64, 64, 4, 5), (64, 32, 4, 5), (64, 128, 8, 3), (128, 32, 8, 5)],
    256: [(64, 64, 8, 3), (32, 32, 8, 5), (32, 32, 4, 5)],
}
#: The same for quantized caches.
_DECODE_QUANTIZED = [(64, 64, 8, 2), (64, 32, 4, 2)]
_PREFILL_QUANTIZED = [(64, 32, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2)]


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that configs depend on.

    Attributes:
        capability: compute capability, 80 for sm_80.
        processors: number of multiprocessors.
        shared_memory: bytes that one program may use.
    """

    capability: int
    processors: int
    shared_memory: int

    @property
    def spares_registers(self) -> bool:
        """Whether matrix units read operands from shared memory: data centre GPUs from Hopper on."""
        return 90 <= self.capability < 120


@cache
def device_of(device: torch.device) -> Device:
    """The properties of a GPU; under the interpreter, those of a small A100."""
    if interpreted():
        return Device(80, 4, 1 << 17)
    properties = torch.cuda.get_device_properties(device)
    # Builds of torch for other vendors' GPUs lack the larger limit.
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count, int(shared))


class Problem(NamedTuple):
    """What the best config depends on. Sizes are rounded, so that similar calls share a problem and few are timed.

    Attributes:
        cache_kind: see `paged_quantized`.
        draft: whether the lower 4 bits are left out.
        dtype: of the queries.
        heads, ratio: number of KV heads, and of query heads per KV head.
        dim, value_dim: head dimensions of keys and of values.
        block_size: of the cache.
        new: most new tokens of a sequence.
        sequences: number of sequences.
        context: most tokens that a sequence sees.
    """

    cache_kind: int
    draft: bool
    dtype: torch.dtype
    heads: int
    ratio: int
    dim: int
    value_dim: int
    block_size: int
    new: int
    sequences: int
    context: int

    @classmethod
    def of(cls, args: AttentionArgs, new: int, sequences: int) -> "Problem":
        """The problem of a call with `sequences` sequences of at most `new` new tokens each; sizes are rounded up."""
        (_, block_size, heads, dim), value_dim = args.key_cache.shape, args.value_cache.shape[3]
        visible, new = args.visible(new), min(triton.next_power_of_2(new), _NEW)
        sequences = min(triton.next_power_of_2(sequences), _SEQUENCES, _ALL_NEW // new)
        known = [each for each in _CONTEXTS if each * sequences <= _TOKENS]
        context = next((each for each in known if each >= visible), known[-1])
        return cls(
            cache_kind=cache_kind(args.key_cache),
            draft=args.draft,
            dtype=args.query.dtype,
            heads=heads,
            ratio=args.ratio,
            dim=dim,
            value_dim=value_dim,
            block_size=block_size,
            new=new,
            sequences=sequences,
            context=context,
        )

    def example(self, args: AttentionArgs) -> AttentionArgs:
        """The call to time: the same caches, but sequences with full contexts. Those of `args` may be padding, or short."""
        device, sequences = args.query.device, self.sequences
        query, out = (
            torch.zeros(sequences * self.new, self.heads * self.ratio, dim, dtype=self.dtype, device=device)
            for dim in (self.dim, self.value_dim)
        )
        blocks = torch.arange(sequences * triton.cdiv(self.context, self.block_size), device=device)
        return replace(
            args,
            query=query,
            block_table=(blocks % args.key_cache.shape[0]).int().view(sequences, -1),
            query_start=torch.arange(sequences + 1, dtype=torch.int32, device=device) * self.new,
            seq_lens=torch.full((sequences,), self.context, dtype=torch.int32, device=device),
            out=out,
        )

    @property
    def width(self) -> int:
        """The larger head dimension, padded."""
        return max(padded_dim(self.dim), padded_dim(self.value_dim))

    def fits(self, config: Config, device: Device) -> bool:
        """Whether a config's accumulators and operands fit into registers and shared memory.

        A rule of thumb that holds for all configs that were compiled.
        """
        rows, tokens = config["rows"], config["tokens"]
        threads = 32 * config["warps"]
        sums = 96 if device.spares_registers or config["warps"] > 4 else 80
        in_registers = rows * (self.width + tokens) <= sums * threads and tokens * self.width <= 128 * threads
        return in_registers and self.shared(rows, tokens, config["stages"]) <= device.shared_memory

    def shared(self, rows: int, tokens: int, stages: int) -> int:
        """Bytes of shared memory that a program uses: tiles of keys and of values, queries and weights.

        For plain caches, there is one tile of keys and of values per tile in flight, and from 64 rows on one more, which
        Hopper's matrix units may still be reading. Quantized caches keep the transposed keys, and with tail pages also two
        tiles of these in flight.
        """
        quantized_tiles = 5 if self.cache_kind == INT4.value else 2
        tiles = 2 * ((stages - 1) // 2 + (rows >= 64)) if self.cache_kind == PLAIN.value else quantized_tiles
        return (tiles * tokens * self.width + rows * (self.width + tokens)) * self.dtype.itemsize


def padded_dim(dim: int) -> int:
    """A head dimension, padded as tiles need it: a power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(dim)))


def number_of_splits(programs: int, tokens: int, tile: int, wanted: int) -> int:
    """The number of spans into which each sequence is cut.

    Args:
        programs: number of (sequence, KV head, row tile) triples, each of which is a separate program in any case.
        tokens: most tokens that a sequence sees.
        tile: tokens per tile.
        wanted: total number of programs wanted.
    """
    return max(1, min(-(-wanted // programs), useful_splits(tokens, tile)))


def useful_splits(tokens: int, tile: int) -> int:
    """How many spans of at least MIN_TILES tiles the tokens fill."""
    return -(-tokens // (tile * int(MIN_TILES.value)))


@cache
def decode_configs(problem: Problem, device: Device) -> list[Config]:
    """Configs of the decode kernel that are worth timing, the estimate first."""
    all_rows = problem.new * problem.ratio
    plain = problem.cache_kind == PLAIN.value
    # Two programs share a multiprocessor: while one waits for its first tile, the other computes.
    most = (64, 128) if plain else (16, 32 if problem.cache_kind == FP8.value else 64)
    estimate = _estimate(problem, all_rows, DECODE_ROWS, most, device.shared_memory // 2, device.shared_memory)
    # Four warps need half as many instructions as eight, but on most devices they spill registers at 64 rows.
    estimate["warps"] = 8 if estimate["rows"] == 64 and not device.spares_registers else 4
    programs = problem.sequences * problem.heads * triton.cdiv(all_rows, estimate["rows"])
    others = _DECODE.get(max(64, problem.width), []) if plain else _DECODE_QUANTIZED
    found: list[Config] = []
    for number, tile in enumerate(_tiles(problem, estimate, others, device)):
        wanted = [device.processors * PROGRAMS_PER_PROCESSOR * factor for factor in ((1, 0.5, 2) if number < 2 else (1,))]
        splits = [number_of_splits(programs, problem.context, tile["tokens"], round(each)) for each in wanted]
        found += [{**tile, "splits": each} for each in dict.fromkeys(splits)]
    return found


@cache
def prefill_configs(problem: Problem, device: Device) -> list[Config]:
    """Configs of the prefill kernel that are worth timing, the estimate first."""
    plain = problem.cache_kind == PLAIN.value
    most_rows = PREFILL_ROWS if plain else 64 if device.spares_registers else 32
    shared = device.shared_memory
    estimate = _estimate(problem, problem.new * problem.ratio, most_rows, (16, 64 if plain else 32), shared, shared)
    others = _PREFILL.get(max(64, problem.width), []) if plain else _PREFILL_QUANTIZED
    return _tiles(problem, {**estimate, "warps": 8}, others, device)


def _estimate(
    problem: Problem, rows: int, most_rows: int, tokens: tuple[int, int], wanted_memory: int, memory: int
) -> dict[str, int]:
    """The estimate of the best tile.

    It has `rows` rows, or fewer if heads are wider than 128, and about 32 KiB of keys and values within the limits of
    `tokens`. Two such tiles are in flight if they fit into `wanted_memory`, otherwise one; a tile never exceeds `memory`.

    float32 has to be correct, not fast: it gets the largest tile whose products do not spill. For quantized caches, codes,
    parameters and numbers are in registers at the same time, so one tile is in flight.
    """
    width, size = problem.width, problem.dtype.itemsize
    rows = max(16, min(triton.next_power_of_2(rows), most_rows, most_rows * 128 // width))
    bytes_ = 2 * width * size
    if size == 4:
        return {"rows": min(rows, 32), "tokens": max(16, min(tokens[1], 64, 16384 // bytes_)), "stages": 2}
    count = max(tokens[0], min(tokens[1], 32768 // bytes_))
    stages = 2 if problem.cache_kind != PLAIN.value else 5 if problem.shared(rows, count, 5) <= wanted_memory else 3
    while count > 16 and problem.shared(rows, count, stages) > memory:
        count //= 2
    return {"rows": rows, "tokens": count, "stages": stages}


def _tiles(problem: Problem, estimate: Config, others: Sequence[tuple[int, ...]], device: Device) -> list[Config]:
    """The estimate, then the other tiles that fit, with at most as many rows as the estimate. float32 gets the estimate
    alone.
    """
    found = [estimate]
    for rows, tokens, warps, stages in others if problem.dtype.itemsize < 4 else ():
        tile = {"rows": min(rows, estimate["rows"]), "tokens": tokens, "stages": stages, "warps": warps}
        if tile not in found and problem.fits(tile, device):
            found.append(tile)
    return found
