"""x W^T for few rows of x, straight from packed weights, on the matrix units.

    out^T [N, M] = sum over groups of s * ((q - z) x^T)

The weights are the A operand. Their fragments are read from shared memory as words, and a plane of 16 words unpacks into a
fragment in place (`unpack`). Rows of x are padded to the 8 that the B operand needs. That costs nothing, because the kernel
waits for weights: at 1 row it takes 2 instructions per weight, where a GEMV on the vector units takes 3. So one kernel serves
all numbers of rows. q - z is exact in 16 bit, and the scale multiplies float32 sums, so the weights are never rounded.
"""

import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.autotune import Config
from quantkit.kernels.gpu.matmul.gemm_plan import Steps, block_rows
from quantkit.kernels.gpu.matmul.split_k import launch_gemm, store_tile
from quantkit.kernels.gpu.matmul.unpack import plane_count, scale_and_zero, unpack, unpack_ptx
from quantkit.kernels.layouts.planes import PlaneWeight, block_columns


@triton.jit
def gemm_kernel(  # type: ignore[no-untyped-def]
    x,
    words,
    high_bits,
    qparams,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    words_stride,
    high_bits_stride,
    steps,
    steps_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BF16_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    PLANES_PER_SCALE: tl.constexpr,
    LOADS: tl.constexpr,
    PADDED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """out [split, m, n] of one block of n, one split of K and one block of m.

    Args:
        x: [M, K], rows x_stride apart.
        words, high_bits, qparams: see `PlaneWeight`.
        bias: [N] or None.
        out: [splits, M, N].
        steps: number of steps of the main loop over all of K.
        WORDS, PLANES_PER_SCALE, LOADS: see `Steps`.
        PADDED: whether K ends within a block.
        ASSEMBLY: unpack in PTX and multiply in x's type; otherwise unpack in Triton and multiply in float32.
    """
    PLANES: tl.constexpr = plane_count(BITS)
    BLOCK: tl.constexpr = 16 * PLANES
    TILE: tl.constexpr = PLANES * WORDS
    TYPE: tl.constexpr = x.dtype.element_ty if ASSEMBLY else tl.float32
    # Rows past the end read the last row and are never stored: cheaper than masks in the loop.
    n = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    m = tl.minimum(tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    word = tl.arange(0, WORDS)
    column = word // 16 * BLOCK + word % 16
    x_at = x + m[:, None] * x_stride + column[None, :]
    if BITS == 3:
        words_at = words + n.to(tl.int64)[:, None] * words_stride + (word // 16 * 32 + word % 16)[None, :]
        high_bits_at = high_bits + n.to(tl.int64)[:, None] * high_bits_stride + word[None, :]
    else:
        words_at = words + n.to(tl.int64)[:, None] * words_stride + word[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(1) * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, steps)):
        for load in tl.static_range(LOADS):
            tile = step * LOADS + load
            if BITS == 3:
                low = tl.load(words_at + tile * (2 * WORDS))
                high = tl.load(high_bits_at + tile * WORDS)
            else:
                low = tl.load(words_at + tile * WORDS)
                high = low
            for start in tl.static_range(0, PLANES, PLANES_PER_SCALE):
                group = tl.minimum((tile * TILE + 16 * start) // GROUP, (K - 1) // GROUP)
                scale, zero = scale_and_zero(tl.load(qparams + group * N + n)[:, None], BF16_SCALES)
                part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                for plane in tl.static_range(start, start + PLANES_PER_SCALE):
                    if BITS == 3 and plane == 8:
                        low = tl.load(words_at + tile * (2 * WORDS) + 16)
                    k = tile * TILE + 16 * plane
                    rows = tl.load(x_at + k, mask=(column < K - k)[None, :], other=0.0) if PADDED else tl.load(x_at + k)
                    if ASSEMBLY:
                        codes = unpack_ptx(low, high, zero, plane, BITS, TYPE)
                    else:
                        codes = unpack(low, high, zero, plane, BITS, TYPE)
                    part = tl.dot(codes, tl.trans(rows).to(TYPE), part, input_precision="ieee")
                acc += part * scale
    store_tile(acc, bias, out, M, N, BLOCK_M, BLOCK_N)


def dequant_gemm(x: Tensor, weight: PlaneWeight, bias: Tensor | None, config: Config) -> Tensor:
    """x W^T + bias; arguments as for `dequant_matmul`, but x in 16 bit with contiguous rows; config as in `gemm_plan`."""
    rows, columns = x.shape
    steps = Steps.of(weight.bits, weight.group_size, columns)
    return launch_gemm(
        gemm_kernel,
        (x,),
        (weight.words, weight.words if weight.high_bits is None else weight.high_bits),
        weight,
        bias,
        x.new_empty(rows, weight.shape[0]),
        config,
        steps,
        block_rows(rows),
        WORDS=steps.words,
        PLANES_PER_SCALE=steps.planes_per_scale,
        PADDED=columns % block_columns(weight.bits) != 0,
    )
