"""Activations -> integers and one scale a row, in the order in which packed weights meet them.

    q = round(x * m / max|x|), m = 127 or 7, scale = max|x| / m

`rounded_gemm` reads weights by the byte: bits j*b .. j*b+b-1 of 32 bytes are the codes of 32 columns, two of each of 16 words
(see `planes`). For every such run of codes the integers of its columns lie side by side.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.layouts.planes import block_columns

#: Positions that a program fills, whole blocks of any number of bits.
_CHUNK = 1024


@dataclass(frozen=True)
class RoundedRows:
    """M rows of K activations.

    Attributes:
        codes: int8 [M, K'], K' = K rounded up to whole blocks of the weight; in the weight's order, the padding is 0.
        sums: int32 [G, M], of the codes of each group of columns.
        scales: float32 [M].
    """

    codes: Tensor
    sums: Tensor
    scales: Tensor


@triton.constexpr_function
def byte_fields(bits: int) -> int:
    """Codes of a byte; of the low two bits where there are 3."""
    return 4 if bits == 3 else 8 // bits


@triton.jit
def column_of(position, FIELDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The column whose integer stands at a position: byte i of field j is of word i // 2, plane i % 2 * FIELDS + j."""
    inside = position % (32 * FIELDS)
    return position - inside + 16 * (inside % 2 * FIELDS + inside // 32) + inside % 32 // 2


@triton.jit
def nearest(x):  # type: ignore[no-untyped-def]
    """The nearest whole number of a float32 below 2^22, of two the even one: with 1.5 * 2^23 added there is no place for a
    fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _integers(x, at, inside, inverse):  # type: ignore[no-untyped-def]
    """Float32 whole numbers of x[at] * inverse; 0 outside."""
    return nearest(tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse)


@triton.jit
def round_kernel(  # type: ignore[no-untyped-def]
    x,
    codes,
    sums,
    scales,
    M,
    K,
    x_stride,
    padded,
    MOST: tl.constexpr,
    FIELDS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A chunk of a row's codes, and the sums of the groups that begin in it. Every program finds the row's scale for itself.

    Args:
        x: [M, K], rows x_stride apart.
        codes, sums, scales: see `RoundedRows`; K' is `padded`.
        WIDTH: columns of a group that are summed at a time.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    x += row.to(tl.int64) * x_stride
    largest = tl.zeros([CHUNK], tl.float32)
    for first in range(0, K, CHUNK):
        at = first + tl.arange(0, CHUNK)
        largest = tl.maximum(largest, tl.abs(tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)))
    most = tl.max(largest, 0)
    inverse = tl.where(most > 0, tl.div_rn(MOST + tl.zeros_like(most), tl.where(most > 0, most, 1.0)), 0.0)
    if chunk == 0:
        tl.store(scales + row, tl.div_rn(most, MOST + tl.zeros_like(most)))
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    column = column_of(position, FIELDS)
    code = _integers(x, column, column < K, inverse)
    tl.store(codes + row.to(tl.int64) * padded + position, code.to(tl.int8), mask=position < padded)
    last = tl.minimum(tl.cdiv((chunk + 1) * CHUNK, GROUP), K // GROUP)
    for first in range(tl.cdiv(chunk * CHUNK, GROUP), last, CHUNK // WIDTH):
        group = first + tl.arange(0, CHUNK // WIDTH)
        total = tl.zeros([CHUNK // WIDTH], tl.int32)
        for begin in range(0, GROUP, WIDTH):
            offset = begin + tl.arange(0, WIDTH)
            inside = (group < last)[:, None] & (offset < GROUP)[None, :]
            at = group[:, None] * GROUP + offset[None, :]
            total += tl.sum(_integers(x, at, inside, inverse).to(tl.int32), 1)
        tl.store(sums + group * M + row, total, mask=group < last)


def round_rows(x: Tensor, activation_bits: int, bits: int, group_size: int) -> RoundedRows:
    """Round activations for weights of `bits` bits.

    Args:
        x: floating [M, K], finite, its rows contiguous.
        activation_bits: 4 or 8.
        bits, group_size: of the weight; see `PlaneWeight`.
    """
    rows, columns = x.shape
    padded = triton.cdiv(columns, block_columns(bits)) * block_columns(bits)
    codes = torch.empty(rows, padded, dtype=torch.int8, device=x.device)
    sums = torch.empty(columns // group_size, rows, dtype=torch.int32, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    round_kernel[rows, triton.cdiv(padded, _CHUNK)](
        x,
        codes,
        sums,
        scales,
        rows,
        columns,
        x.stride(0),
        padded,
        MOST=float(2 ** (activation_bits - 1) - 1),
        FIELDS=byte_fields(bits),
        GROUP=group_size,
        WIDTH=min(triton.next_power_of_2(group_size), _CHUNK),
        CHUNK=_CHUNK,
        num_warps=4,
        # A product fused with what is added to it would be rounded once instead of twice: another integer at a tie.
        enable_fp_fusion=False,
    )
    return RoundedRows(codes, sums, scales)
