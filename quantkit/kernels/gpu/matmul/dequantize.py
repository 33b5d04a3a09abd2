"""Dequantizes packed weights to a dense matrix: W[n, k] = (q - z) * s, rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.gpu.matmul.unpack import plane_count, scale_and_zero, unpack
from quantkit.kernels.layouts.planes import PlaneWeight, block_columns


@triton.jit
def dequantize_kernel(  # type: ignore[no-untyped-def]
    words,
    high_bits,
    qparams,
    out,
    N,
    K,
    words_stride,
    high_bits_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BF16_SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each program writes one block of columns of BLOCK_N rows of out [N, K].

    Groups are whole planes, so within a plane each row has one scale.
    """
    PLANES: tl.constexpr = plane_count(BITS)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = n < N
    block = tl.program_id(1)
    word = tl.arange(0, 16)[None, :]
    if BITS == 3:
        words_at = words + n[:, None] * words_stride + block * 32 + word
        high = tl.load(high_bits + n[:, None] * high_bits_stride + block * 16 + word, mask=inside[:, None], other=0)
    else:
        words_at = words + n[:, None] * words_stride + block * 16 + word
        high = None
    low = tl.load(words_at, mask=inside[:, None], other=0)
    for plane in tl.static_range(PLANES):
        if BITS == 3 and plane == 8:
            low = tl.load(words_at + 16, mask=inside[:, None], other=0)
        start = (block * PLANES + plane) * 16
        group = tl.minimum(start, K - 1) // GROUP
        scale, zero = scale_and_zero(tl.load(qparams + group * N + n, mask=inside, other=0)[:, None], BF16_SCALES)
        values = unpack(low, high, zero, plane, BITS, tl.float32) * scale
        tl.store(out + n[:, None] * K + start + word, values, mask=inside[:, None] & (start + word < K))


def dequantize(weight: PlaneWeight, dtype: torch.dtype) -> Tensor:
    """The dequantized weight, [N, K] in float16, bfloat16 or float32."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    high_bits = weight.words if weight.high_bits is None else weight.high_bits
    dequantize_kernel[triton.cdiv(rows, 64), triton.cdiv(columns, block_columns(weight.bits))](
        weight.words,
        high_bits,
        weight.qparams,
        out,
        rows,
        columns,
        weight.words.stride(0),
        high_bits.stride(0),
        BITS=weight.bits,
        GROUP=weight.group_size,
        BF16_SCALES=weight.scale_type == torch.bfloat16,
        BLOCK_N=64,
    )
    return out
