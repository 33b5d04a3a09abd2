"""How the paged kernels cut a problem up: the tile of a program, the spans of a sequence, and the configs worth timing.

A config has `rows` and `tokens`, of a tile of scores; `warps`; `stages`, of which the block table is read one less ahead and
the caches half of that; and for decoding `splits`, the spans of a sequence. The first config is an estimate, which serves
where nothing can be timed. The others were compiled for sm_80 and sm_90: those that spill registers are not among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantkit.kernels.autotune import Config
from quantkit.kernels.gpu.attention.paged_launch import Call
from quantkit.kernels.gpu.attention.paged_quantized import FP8, PAGES, PLAIN, form
from quantkit.kernels.gpu.attention.paged_tile import interpreted

#: Least tiles worth a program of its own: writing and merging a span costs about as much as reading a quarter of a tile.
MIN_TILES = tl.constexpr(2)

#: Programs wanted on each multiprocessor: two fit at a time, and twice as many even out sequences of unequal length.
PROGRAMS_PER_PROCESSOR = 4

#: Rows of a tile at most, when decoding: more (multi-query attention with many heads and a draft) take several programs; and
#: when prefilling: what the matrix units of Hopper take from two groups of four warps.
DECODE_ROWS, PREFILL_ROWS = 64, 128

#: Contexts are timed as the next of these.
_CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 16)

#: What is timed at most: sequences, new tokens of one and of all, tokens of all contexts. Beyond, there is more of the same.
_SEQUENCES, _NEW, _ALL_NEW, _TOKENS = 256, 1 << 10, 1 << 13, 1 << 20

#: Other tiles than the estimate by the width of a head (64: or less): most rows, tokens, warps, stages.
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
_DECODE_STORED = [(64, 64, 8, 2), (64, 32, 4, 2)]
_PREFILL_STORED = [(64, 32, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2)]


@dataclass(frozen=True)
class Device:
    """What the shape of a launch depends on.

    Attributes:
        capability: of the compute architecture, 80 for sm_80.
        processors: number of multiprocessors.
        shared_memory: bytes that one program may have.
    """

    capability: int
    processors: int
    shared_memory: int

    @property
    def spares_registers(self) -> bool:
        """Whether matrix units take operands from shared memory: data centre GPUs from Hopper on."""
        return 90 <= self.capability < 120


@cache
def device_of(device: torch.device) -> Device:
    """What a GPU is like; under the interpreter, a small A100."""
    if interpreted():
        return Device(80, 4, 1 << 17)
    properties = torch.cuda.get_device_properties(device)
    # Builds of torch for other makers' GPUs lack the larger limit.
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count, int(shared))


class Problem(NamedTuple):
    """What the best config depends on. Calls that are alike share one, so that few are timed.

    Attributes:
        form: of the cache, see `paged_stored`.
        draft: whether lower planes are left out.
        dtype: of the queries.
        heads, ratio: KV heads, and query heads for each of them.
        dim, value_dim: head dimensions.
        block_size: of the cache.
        new: new tokens of a sequence at most.
        sequences: how many.
        context: tokens that each can see.
    """

    form: int
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
    def of(cls, call: Call, new: int, sequences: int) -> "Problem":
        """Of a call with so many sequences of at most `new` new tokens, rounded up as far as they are told apart."""
        (_, block_size, heads, dim), value_dim = call.key_cache.shape, call.value_cache.shape[3]
        visible, new = call.visible(new), min(triton.next_power_of_2(new), _NEW)
        sequences = min(triton.next_power_of_2(sequences), _SEQUENCES, _ALL_NEW // new)
        known = [each for each in _CONTEXTS if each * sequences <= _TOKENS]
        context = next((each for each in known if each >= visible), known[-1])
        kind = form(call.key_cache), call.draft, call.query.dtype
        return cls(*kind, heads, call.ratio, dim, value_dim, block_size, new, sequences, context)

    def example(self, call: Call) -> Call:
        """What is timed: the same caches, and sequences whose contexts are full. A call's own may be padding, and short."""
        device, sequences = call.query.device, self.sequences
        query, out = (
            torch.zeros(sequences * self.new, self.heads * self.ratio, dim, dtype=self.dtype, device=device)
            for dim in (self.dim, self.value_dim)
        )
        blocks = torch.arange(sequences * triton.cdiv(self.context, self.block_size), device=device)
        return replace(
            call,
            query=query,
            block_table=(blocks % call.key_cache.shape[0]).int().view(sequences, -1),
            query_start=torch.arange(sequences + 1, dtype=torch.int32, device=device) * self.new,
            seq_lens=torch.full((sequences,), self.context, dtype=torch.int32, device=device),
            out=out,
        )

    @property
    def width(self) -> int:
        """Head dimension, the wider one, padded."""
        return max(padded(self.dim), padded(self.value_dim))

    def fits(self, config: Config, device: Device) -> bool:
        """Whether a config's accumulators and operands fit registers and shared memory: a rule that holds for what was
        compiled."""
        rows, tokens, threads = config["rows"], config["tokens"], 32 * config["warps"]
        sums = 96 if device.spares_registers or config["warps"] > 4 else 80
        in_registers = rows * (self.width + tokens) <= sums * threads and tokens * self.width <= 128 * threads
        return in_registers and self.shared(rows, tokens, config["stages"]) <= device.shared_memory

    def shared(self, rows: int, tokens: int, stages: int) -> int:
        """Bytes of shared memory: tiles of keys and of values, queries and weights.

        Plain tiles are there once for each that is in flight, and from 64 rows on once more, for what Hopper's matrix unit may
        still be reading; of quantized ones the keys, turned; of pages besides two of open ones in flight.
        """
        stored = 5 if self.form == PAGES.value else 2
        tiles = 2 * ((stages - 1) // 2 + (rows >= 64)) if self.form == PLAIN.value else stored
        return (tiles * tokens * self.width + rows * (self.width + tokens)) * self.dtype.itemsize


def padded(dim: int) -> int:
    """A head dimension as tiles have it: a power of two, 16 at least."""
    return max(16, int(triton.next_power_of_2(dim)))


def number_of_splits(programs: int, tokens: int, tile: int, wanted: int) -> int:
    """Spans into which to cut every sequence.

    Args:
        programs: (sequence, KV head, row tile) triples, which run side by side anyhow.
        tokens: most that a sequence can see.
        tile: tokens of a tile.
        wanted: programs in all.
    """
    return max(1, min(-(-wanted // programs), useful_splits(tokens, tile)))


def useful_splits(tokens: int, tile: int) -> int:
    """Spans of at least MIN_TILES tiles that so many tokens fill."""
    return -(-tokens // (tile * int(MIN_TILES.value)))


@cache
def decode_configs(problem: Problem, device: Device) -> list[Config]:
    """Configs of the decode kernel worth timing, the estimate first."""
    all_rows = problem.new * problem.ratio
    plain = problem.form == PLAIN.value
    # Two programs share a multiprocessor: while one waits for its first tile, the other reads.
    most = (64, 128) if plain else (16, 32 if problem.form == FP8.value else 64)
    estimate = _estimate(problem, all_rows, DECODE_ROWS, most, device.shared_memory // 2, device.shared_memory)
    # Four warps do it in half the instructions of eight, but on most devices 64 rows would spill their registers.
    estimate["warps"] = 8 if estimate["rows"] == 64 and not device.spares_registers else 4
    programs = problem.sequences * problem.heads * triton.cdiv(all_rows, estimate["rows"])
    others = _DECODE.get(max(64, problem.width), []) if plain else _DECODE_STORED
    found: list[Config] = []
    for number, tile in enumerate(_tiles(problem, estimate, others, device)):
        wanted = [device.processors * PROGRAMS_PER_PROCESSOR * factor for factor in ((1, 0.5, 2) if number < 2 else (1,))]
        splits = [number_of_splits(programs, problem.context, tile["tokens"], round(each)) for each in wanted]
        found += [{**tile, "splits": each} for each in dict.fromkeys(splits)]
    return found


@cache
def prefill_configs(problem: Problem, device: Device) -> list[Config]:
    """Configs of the prefill kernel worth timing, the estimate first."""
    plain = problem.form == PLAIN.value
    most_rows = PREFILL_ROWS if plain else 64 if device.spares_registers else 32
    shared = device.shared_memory
    estimate = _estimate(problem, problem.new * problem.ratio, most_rows, (16, 64 if plain else 32), shared, shared)
    others = _PREFILL.get(max(64, problem.width), []) if plain else _PREFILL_STORED
    return _tiles(problem, {**estimate, "warps": 8}, others, device)


def _estimate(
    problem: Problem, rows: int, most_rows: int, tokens: tuple[int, int], wanted_memory: int, memory: int
) -> dict[str, int]:
    """`rows`, or fewer where heads are wider than 128, and about 32 KiB of keys and values within the limits of `tokens`; two
    such tiles in flight where `wanted_memory` has room for them, one otherwise; never more than fits into `memory`.

    float32 is there to be right, not fast: it gets the largest tile whose products do not spill. Of quantized caches codes,
    parameters and numbers are in registers at once: one tile in flight.
    """
    width, size = problem.width, problem.dtype.itemsize
    rows = max(16, min(triton.next_power_of_2(rows), most_rows, most_rows * 128 // width))
    bytes_ = 2 * width * size
    if size == 4:
        return {"rows": min(rows, 32), "tokens": max(16, min(tokens[1], 64, 16384 // bytes_)), "stages": 2}
    count = max(tokens[0], min(tokens[1], 32768 // bytes_))
    stages = 2 if problem.form != PLAIN.value else 5 if problem.shared(rows, count, 5) <= wanted_memory else 3
    while count > 16 and problem.shared(rows, count, stages) > memory:
        count //= 2
    return {"rows": rows, "tokens": count, "stages": stages}


def _tiles(problem: Problem, estimate: Config, others: Sequence[tuple[int, ...]], device: Device) -> list[Config]:
    """The estimate and what else fits, with no more rows than that has. float32 has the estimate alone."""
    found = [estimate]
    for rows, tokens, warps, stages in others if problem.dtype.itemsize < 4 else ():
        tile = {"rows": min(rows, estimate["rows"]), "tokens": tokens, "stages": stages, "warps": warps}
        if tile not in found and problem.fits(tile, device):
            found.append(tile)
    return found
