"""What the GEMM kernels share: the launch, split K, and the second pass that adds the partial sums.

K is split over programs until the GPU is full. Each program then writes float32 partial sums, and a second kernel adds them in
a fixed order: the same input gives the same bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.autotune import Config
from quantkit.kernels.gpu.common import uses_ptx
from quantkit.kernels.gpu.matmul.gemm_plan import Steps
from quantkit.kernels.layouts.planes import PlaneWeight


@triton.jit
def store_tile(acc, bias, out, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store acc [BLOCK_N, BLOCK_M] + bias as this program's tile of out [splits, M, N]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(1) * M + m)[None, :] * N + n[:, None]
    tl.store(out + at, acc, mask=(n < N)[:, None] & (m < M)[None, :])


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
class SplitKOutput:
    """Where a product is written.

    Attributes:
        out: [M, N], the result.
        partial: float32 [splits, M, N], the partial sums of each split; `out` itself if there is one split.
        steps_per_split: steps of the main loop per split.
    """

    out: Tensor
    partial: Tensor
    steps_per_split: int

    @classmethod
    def allocate(cls, out: Tensor, steps: Steps, splits: int) -> "SplitKOutput":
        """Partial sums for K cut into at most `splits` splits of whole steps."""
        per_split = triton.cdiv(steps.count, splits)
        splits = triton.cdiv(steps.count, per_split)
        return cls(out, out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32), per_split)

    @property
    def splits(self) -> int:
        """Number of splits of K."""
        return 1 if self.partial is self.out else len(self.partial)

    def reduce(self, bias: Tensor | None) -> Tensor:
        """`out`, after adding up the splits and `bias`. With one split, the GEMM kernel has added `bias` already."""
        if self.splits > 1:
            size = self.out.numel()
            blocks = triton.cdiv(size, 512)
            reduce_kernel[blocks,](self.partial, bias, self.out, self.out.shape[1], size, SPLITS=self.splits, BLOCK=512)
        return self.out


def launch_gemm(
    kernel: Any,
    inputs: tuple[Tensor, ...],
    codes: tuple[Tensor, Tensor],
    weight: PlaneWeight,
    bias: Tensor | None,
    out: Tensor,
    config: Config,
    steps: Steps,
    block_m: int,
    **constants: int,
) -> Tensor:
    """Run a GEMM kernel, and the second pass if K is split.

    Args:
        kernel: a Triton kernel whose arguments are `inputs`, words, high_bits, qparams, bias, out, M, N, K, x_stride,
            words_stride, high_bits_stride, steps and steps_per_split.
        inputs: the activations [M, ..] and what belongs to them.
        codes: the words and high bits of `weight`, in the type that the kernel reads; the words twice if it has no high bits.
        weight: of shape (N, K).
        bias: [N] or None.
        out: [M, N], is written.
        config: see `gemm_plan.candidates`.
        steps: of the main loop.
        block_m: rows of x per program.
        constants: the kernel's further constexprs.
    """
    rows, (out_columns, columns) = len(out), weight.shape
    output = SplitKOutput.allocate(out, steps, config["splits"])
    words, high_bits = codes
    kernel[triton.cdiv(out_columns, config["block_n"]), output.splits, triton.cdiv(rows, block_m)](
        *inputs,
        words,
        high_bits,
        weight.qparams,
        bias if output.splits == 1 else None,
        output.partial,
        rows,
        out_columns,
        columns,
        inputs[0].stride(0),
        words.stride(0),
        high_bits.stride(0),
        steps.count,
        output.steps_per_split,
        BITS=weight.bits,
        GROUP=weight.group_size,
        BF16_SCALES=weight.scale_type == torch.bfloat16,
        BLOCK_M=block_m,
        BLOCK_N=config["block_n"],
        LOADS=steps.loads,
        ASSEMBLY=uses_ptx(),
        num_warps=config["warps"],
        num_stages=config["stages"],
        **constants,
    )
    return output.reduce(bias)
