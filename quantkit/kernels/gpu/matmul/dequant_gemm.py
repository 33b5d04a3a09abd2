"""x W^T for few rows of x, straight from packed weights, on the matrix unit.

    out^T [N, M] = sum over groups of s * ((q - z) x^T)

The weights are the A operand: their fragments come from shared memory as words, and a plane of 16 words unpacks into a
fragment in place (`unpack`). Rows of x are padded to the 8 that the B operand needs, which costs nothing while weights are
what is waited for: at 1 row this takes 2 instructions a weight, a GEMV on the vector units 3. So one kernel serves all. q - z
is exact in 16 bit and the scale multiplies float32 sums, so the weights are never rounded.

K is split over programs until the GPU is full. Each then writes float32 partial sums and a second pass adds them up in a
fixed order: the same input gives the same bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.autotune import Config
from quantkit.kernels.gpu.matmul.gemm_plan import Steps, block_rows
from quantkit.kernels.gpu.matmul.unpack import compiled, plane_count, scale_and_zero, unpack, unpack_ptx
from quantkit.kernels.layouts.planes import PlaneWeight, block_columns


@triton.jit
def store_sums(acc, bias, out, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc [BLOCK_N, BLOCK_M] + bias as a program's block of out [splits, M, N]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(1) * M + m)[None, :] * N + n[:, None]
    tl.store(out + at, acc, mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def gemm_kernel(  # type: ignore[no-untyped-def]
    x,
    words,
    third,
    grids,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    words_stride,
    third_stride,
    steps,
    steps_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BRAIN_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    SAME: tl.constexpr,
    LOADS: tl.constexpr,
    PADDED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """out [split, m, n] of one block of n, one share of K and one block of m.

    Args:
        x: [M, K], rows x_stride apart.
        words, third, grids: see `PlaneWeight`.
        bias: [N] or None.
        out: [splits, M, N].
        steps: of the main loop, along all of K.
        WORDS, SAME, LOADS: see `Steps`.
        PADDED: whether K ends within a block.
        ASSEMBLY: unpack in PTX and multiply in x's type; else unpack in Triton and multiply in float32.
    """
    PLANES: tl.constexpr = plane_count(BITS)
    BLOCK: tl.constexpr = 16 * PLANES
    TILE: tl.constexpr = PLANES * WORDS
    TYPE: tl.constexpr = x.dtype.element_ty if ASSEMBLY else tl.float32
    # Rows beyond the end are read as the last one again and never stored: cheaper than masks in the loop.
    n = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    m = tl.minimum(tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    word = tl.arange(0, WORDS)
    column = word // 16 * BLOCK + word % 16
    x_at = x + m[:, None] * x_stride + column[None, :]
    if BITS == 3:
        words_at = words + n.to(tl.int64)[:, None] * words_stride + (word // 16 * 32 + word % 16)[None, :]
        third_at = third + n.to(tl.int64)[:, None] * third_stride + word[None, :]
    else:
        words_at = words + n.to(tl.int64)[:, None] * words_stride + word[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(1) * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, steps)):
        for load in tl.static_range(LOADS):
            tile = step * LOADS + load
            if BITS == 3:
                low = tl.load(words_at + tile * (2 * WORDS))
                high = tl.load(third_at + tile * WORDS)
            else:
                low = tl.load(words_at + tile * WORDS)
                high = low
            for start in tl.static_range(0, PLANES, SAME):
                group = tl.minimum((tile * TILE + 16 * start) // GROUP, (K - 1) // GROUP)
                scale, zero = scale_and_zero(tl.load(grids + group * N + n)[:, None], BRAIN_SCALES)
                part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                for plane in tl.static_range(start, start + SAME):
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
    store_sums(acc, bias, out, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def reduce_kernel(partial, bias, out, N, SIZE, SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out [SIZE] = sum of partial [SPLITS, SIZE], first to last, + bias [N]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * SIZE + at, mask=at < SIZE, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % N, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=at < SIZE)


@dataclass(frozen=True)
class Output:
    """What a product writes to.

    Attributes:
        out: [M, N], the result.
        partial: float32 [splits, M, N], the sums of each share of K; `out` itself where one program has all of K.
        steps_per_split: of the main loop.
    """

    out: Tensor
    partial: Tensor
    steps_per_split: int

    @classmethod
    def of(cls, out: Tensor, steps: Steps, splits: int) -> "Output":
        """For K cut into about `splits` shares of whole steps."""
        per_split = triton.cdiv(steps.count, splits)
        splits = triton.cdiv(steps.count, per_split)
        return cls(out, out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32), per_split)

    @property
    def splits(self) -> int:
        """Shares of K."""
        return 1 if self.partial is self.out else len(self.partial)

    def add_up(self, bias: Tensor | None) -> Tensor:
        """`out`, once the sums of all shares are there; `bias` was added already where there is one share."""
        if self.splits > 1:
            size = self.out.numel()
            blocks = triton.cdiv(size, 512)
            reduce_kernel[blocks,](self.partial, bias, self.out, self.out.shape[1], size, SPLITS=self.splits, BLOCK=512)
        return self.out


def dequant_gemm(x: Tensor, weight: PlaneWeight, bias: Tensor | None, config: Config) -> Tensor:
    """x W^T + bias; arguments as for `dequant_matmul`, x in 16 bit, its rows contiguous; config as in `gemm_plan`."""
    (rows, columns), out_columns = x.shape, weight.shape[0]
    steps = Steps.of(weight.bits, weight.group_size, columns)
    output = Output.of(x.new_empty(rows, out_columns), steps, config["splits"])
    third = weight.words if weight.third is None else weight.third
    block_m = block_rows(rows)
    gemm_kernel[triton.cdiv(out_columns, config["block_n"]), output.splits, triton.cdiv(rows, block_m)](
        x,
        weight.words,
        third,
        weight.grids,
        bias if output.splits == 1 else None,
        output.partial,
        rows,
        out_columns,
        columns,
        x.stride(0),
        weight.words.stride(0),
        third.stride(0),
        steps.count,
        output.steps_per_split,
        BITS=weight.bits,
        GROUP=weight.group_size,
        BRAIN_SCALES=weight.scale_type == torch.bfloat16,
        BLOCK_M=block_m,
        BLOCK_N=config["block_n"],
        WORDS=steps.words,
        SAME=steps.same,
        LOADS=steps.loads,
        PADDED=columns % block_columns(weight.bits) != 0,
        ASSEMBLY=compiled(),
        num_warps=config["warps"],
        num_stages=config["stages"],
    )
    return output.add_up(bias)
