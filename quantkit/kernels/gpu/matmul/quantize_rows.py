"""Quantizes activations to integers with one scale per row, in the order in which `w4a8_gemm` reads packed weights.

    q = round(x * m / max|x|), m = 127 or 7, scale = max|x| / m

`w4a8_gemm` reads weights byte by byte: bits j*b .. j*b+b-1 of 32 bytes are the codes of 32 columns, two from each of 16 words
(see `planes`). The integers of these 32 columns are stored next to each other.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.gpu.common import round_half_even
from quantkit.kernels.layouts.planes import block_columns

#: Positions that a program fills: whole blocks for any number of bits.
_CHUNK = 1024


@dataclass(frozen=True)
class QuantizedRows:
    """M rows of K activations.

    Attributes:
        codes: int8 [M, K'], K' = K rounded up to whole blocks of the weight; in the weight's order, padded with 0.
        sums: int32 [G, M], the sum of the codes of each group of columns.
        scales: float32 [M].
    """

    codes: Tensor
    sums: Tensor
    scales: Tensor


@triton.constexpr_function
def codes_per_byte(bits: int) -> int:
    """Codes per byte of words; for 3 bits, of the words that hold the low two bits."""
    return 4 if bits == 3 else 8 // bits


@triton.jit
def column_of(position, FIELDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The column whose integer is at a position: byte i of field j belongs to word i // 2, plane i % 2 * FIELDS + j."""
    inside = position % (32 * FIELDS)
    return position - inside + 16 * (inside % 2 * FIELDS + inside // 32) + inside % 32 // 2


@triton.jit
def _load_quantized(x, at, inside, inverse):  # type: ignore[no-untyped-def]
    """x[at] * inverse, rounded, as float32; 0 outside."""
    return round_half_even(tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse)


@triton.jit
def quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x,
    codes,
    sums,
    scales,
    M,
    K,
    x_stride,
    padded,
    INT_MAX: tl.constexpr,
    FIELDS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Writes a chunk of a row's codes, and the sums of the groups that begin in it. Each program computes the row's scale.

    Args:
        x: [M, K], rows x_stride apart.
        codes, sums, scales: see `QuantizedRows`; K' is `padded`.
        WIDTH: columns of a group that are summed at a time.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    x += row.to(tl.int64) * x_stride
    largest = tl.zeros([CHUNK], tl.float32)
    for first in range(0, K, CHUNK):
        at = first + tl.arange(0, CHUNK)
        largest = tl.maximum(largest, tl.abs(tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)))
    row_max = tl.max(largest, 0)
    inverse = tl.where(row_max > 0, tl.div_rn(INT_MAX + tl.zeros_like(row_max), tl.where(row_max > 0, row_max, 1.0)), 0.0)
    if chunk == 0:
        tl.store(scales + row, tl.div_rn(row_max, INT_MAX + tl.zeros_like(row_max)))
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    column = column_of(position, FIELDS)
    code = _load_quantized(x, column, column < K, inverse)
    tl.store(codes + row.to(tl.int64) * padded + position, code.to(tl.int8), mask=position < padded)
    last = tl.minimum(tl.cdiv((chunk + 1) * CHUNK, GROUP), K // GROUP)
    for first in range(tl.cdiv(chunk * CHUNK, GROUP), last, CHUNK // WIDTH):
        group = first + tl.arange(0, CHUNK // WIDTH)
        total = tl.zeros([CHUNK // WIDTH], tl.int32)
        for begin in range(0, GROUP, WIDTH):
            offset = begin + tl.arange(0, WIDTH)
            inside = (group < last)[:, None] & (offset < GROUP)[None, :]
            at = group[:, None] * GROUP + offset[None, :]
            total += tl.sum(_load_quantized(x, at, inside, inverse).to(tl.int32), 1)
        tl.store(sums + group * M + row, total, mask=group < last)


def quantize_rows(x: Tensor, activation_bits: int, bits: int, group_size: int) -> QuantizedRows:
    """Quantize activations for a weight of `bits` bits.

    Args:
        x: floating [M, K], finite, its rows contiguous.
        activation_bits: 4 or 8.
        bits, group_size: of the weight, see `PlaneWeight`.
    """
    rows, columns = x.shape
    padded = triton.cdiv(columns, block_columns(bits)) * block_columns(bits)
    codes = torch.empty(rows, padded, dtype=torch.int8, device=x.device)
    sums = torch.empty(columns // group_size, rows, dtype=torch.int32, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    quantize_rows_kernel[rows, triton.cdiv(padded, _CHUNK)](
        x,
        codes,
        sums,
        scales,
        rows,
        columns,
        x.stride(0),
        padded,
        INT_MAX=float(2 ** (activation_bits - 1) - 1),
        FIELDS=codes_per_byte(bits),
        GROUP=group_size,
        WIDTH=min(triton.next_power_of_2(group_size), _CHUNK),
        CHUNK=_CHUNK,
        num_warps=4,
        # With a fused multiply-add, the product would not be rounded before the addition, and ties could round differently.
        enable_fp_fusion=False,
    )
    return QuantizedRows(codes, sums, scales)
