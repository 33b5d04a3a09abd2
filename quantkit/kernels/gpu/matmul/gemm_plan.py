"""How the GEMM kernels divide a problem: steps along K, and the configs that are worth timing."""

from dataclasses import dataclass
from functools import cache
from math import gcd

import torch

from quantkit.kernels.autotune import Config
from quantkit.kernels.layouts.planes import PLANE, block_columns

#: Above the first number of rows, multiplying with a dense copy of the weight may be faster; above the second, it always is.
DENSE_MAYBE_ROWS, DENSE_ALWAYS_ROWS = 128, 512

#: The config that means: multiply with a dense copy.
DENSE: Config = {"dense": 1}

#: Columns per step of the main loop, if blocks and groups allow it.
STEP_COLUMNS = 128


@dataclass(frozen=True)
class Steps:
    """How the main loop advances along K.

    Attributes:
        words: words per load and row, a multiple of 16.
        loads: loads per step.
        planes_per_scale: consecutive planes that share a scale.
        count: number of steps.
    """

    words: int
    loads: int
    planes_per_scale: int
    count: int

    @classmethod
    def of(cls, bits: int, group: int, columns: int) -> "Steps":
        """A load spans at most one group, or one block if groups are smaller than that; groups are whole planes."""
        block = block_columns(bits)
        blocks = -(-columns // block)
        # With one group per row, the group includes the padding.
        group = blocks * block if group == columns else group
        wide = gcd(max(1, STEP_COLUMNS // block), blocks)
        wide = gcd(wide, group // block) if group % block == 0 else 1
        loads = gcd(max(1, STEP_COLUMNS // (wide * block)), blocks // wide)
        planes_per_scale = (block if group % (wide * block) == 0 else gcd(group, block)) // PLANE
        return cls(16 * wide, loads, planes_per_scale, blocks // (wide * loads))


def padded_rows(rows: int) -> int:
    """Rows of x, rounded up to a power of two and to at least 8. Numbers of rows that round to the same are tuned together."""
    return max(8, 1 << (rows - 1).bit_length())


def block_rows(rows: int) -> int:
    """Rows of x per program: a power of two from 8 to 128."""
    return min(padded_rows(rows), 128)


@cache
def candidates(bits: int, group: int, shape: tuple[int, int], rows: int, device: torch.device) -> list[Config]:
    """Configs worth timing for `rows` rows, the likely best first.

    If registers allow it, a warp has 32 rows of W: with fewer, scales are not prefetched. The number of splits aims at four
        programs
    per multiprocessor; no program gets fewer than two steps.
    """
    tiles = {
        8: [(64, 2, 3), (128, 2, 3), (32, 1, 4), (64, 2, 5), (128, 4, 4)],
        16: [(64, 2, 3), (128, 2, 3), (128, 4, 4)],
        32: [(128, 4, 3), (64, 2, 4), (128, 4, 4)],
        64: [(128, 4, 3), (64, 4, 3), (128, 4, 2)],
        128: [(128, 8, 2), (64, 4, 2), (128, 8, 3)],
    }[block_rows(rows)]
    steps = Steps.of(bits, group, shape[1]).count
    configs = [DENSE] if rows > DENSE_MAYBE_ROWS else []
    for block_n, warps, stages in tiles:
        fill = 4 * _multiprocessors(device) * block_n / shape[0] / -(-rows // 128)
        splits = {min(max(1, round(fill * factor)), max(1, steps // 2), 16): None for factor in (1, 0.5, 2)}
        configs += [{"block_n": block_n, "warps": warps, "stages": stages, "splits": split} for split in splits]
    return configs


@cache
def _multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 under the interpreter."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
