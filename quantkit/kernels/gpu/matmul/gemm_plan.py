"""How `dequant_gemm` cuts a problem up: steps along K, and the configs that are worth timing."""

from dataclasses import dataclass
from functools import cache
from math import gcd

import torch

from quantkit.kernels.autotune import Config
from quantkit.kernels.layouts.planes import PLANE, block_columns

#: Rows of x from which a dense copy of the weights may be worth its making, and from which it surely is.
SOME_ROWS, MANY_ROWS = 128, 512

#: The config that stands for a dense copy.
DENSE: Config = {"dense": 1}

#: Columns of a step of the main loop, where blocks and groups allow it.
STEP = 128


@dataclass(frozen=True)
class Steps:
    """How the main loop walks along K.

    Attributes:
        words: per row of a load, a multiple of 16.
        loads: per step.
        same: planes in a row that share a scale.
        count: of steps.
    """

    words: int
    loads: int
    same: int
    count: int

    @classmethod
    def of(cls, bits: int, group: int, columns: int) -> "Steps":
        """A load spans at most one group, or else one block whose groups are whole planes."""
        block = block_columns(bits)
        blocks = -(-columns // block)
        # One group: its end is beyond the padding, not before.
        group = blocks * block if group == columns else group
        wide = gcd(max(1, STEP // block), blocks)
        wide = gcd(wide, group // block) if group % block == 0 else 1
        loads = gcd(max(1, STEP // (wide * block)), blocks // wide)
        same = (block if group % (wide * block) == 0 else gcd(group, block)) // PLANE
        return cls(16 * wide, loads, same, blocks // (wide * loads))


def padded_rows(rows: int) -> int:
    """Rows of x up to the next power of two, 8 at least: numbers of rows that are padded alike are tuned as one."""
    return max(8, 1 << (rows - 1).bit_length())


def block_rows(rows: int) -> int:
    """Rows of x that a program takes: a power of two, 8 to 128."""
    return min(padded_rows(rows), 128)


@cache
def candidates(bits: int, group: int, shape: tuple[int, int], rows: int, device: torch.device) -> list[Config]:
    """Configs worth timing for `rows` rows, the likely best first.

    Where registers allow it a warp has 32 rows of W, since with fewer scales are not fetched ahead. Splits of K aim at four
    programs a processor, none with fewer than two steps.
    """
    tiles = {
        8: [(64, 2, 3), (128, 2, 3), (32, 1, 4), (64, 2, 5), (128, 4, 4)],
        16: [(64, 2, 3), (128, 2, 3), (128, 4, 4)],
        32: [(128, 4, 3), (64, 2, 4), (128, 4, 4)],
        64: [(128, 4, 3), (64, 4, 3), (128, 4, 2)],
        128: [(128, 8, 2), (64, 4, 2), (128, 8, 3)],
    }[block_rows(rows)]
    steps = Steps.of(bits, group, shape[1]).count
    configs = [DENSE] if rows > SOME_ROWS else []
    for block_n, warps, stages in tiles:
        fill = 4 * _processors(device) * block_n / shape[0] / -(-rows // 128)
        splits = {min(max(1, round(fill * factor)), max(1, steps // 2), 16): None for factor in (1, 0.5, 2)}
        configs += [{"block_n": block_n, "warps": warps, "stages": stages, "splits": split} for split in splits]
    return configs


@cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 under the interpreter."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
