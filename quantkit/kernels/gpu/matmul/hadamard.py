"""x H, block by block, with the orthonormal Hadamard matrix in Sylvester's order: it spreads outliers over all channels.

    H_1 = 1,  H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2)

If a few channels of the activations are large, quantizing to 4 bits rounds all others to zero. After the rotation no channel
is an outlier (QuaRot, arXiv 2404.00456). One program transforms one block of one row, in log2(block) steps of sums and
differences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: The largest block that fits into a program's registers.
LARGEST_BLOCK = 4096


@triton.constexpr_function
def steps(block: int) -> int:
    """log2 of a power of two."""
    return block.bit_length() - 1


@triton.jit
def _step(value, BLOCK: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Replaces each pair of elements that are STEP apart by their sum and their difference."""
    a, b = tl.split(tl.permute(tl.reshape(value, [BLOCK // (2 * STEP), 2, STEP]), [0, 2, 1]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [BLOCK])


@triton.jit
def hadamard_kernel(x, out, x_stride, K, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Transforms one block of one row.

    Args:
        x: [M, K], rows x_stride apart.
        out: [M, K], contiguous.
        scale: 1 / sqrt(BLOCK).
    """
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    at = first + tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + at).to(tl.float32)
    for number in tl.static_range(steps(BLOCK)):
        value = _step(value, BLOCK, 1 << number)
    tl.store(out + row * K + at, (value * scale).to(out.dtype.element_ty))


def hadamard(x: Tensor, block: int) -> Tensor:
    """x H block by block; see `reference.hadamard`.

    Args:
        x: float16, bfloat16 or float32 [..., K], on the current CUDA device (any device under Triton's interpreter).
        block: a power of two that divides K, at most LARGEST_BLOCK.

    Returns:
        [..., K] in x's dtype, contiguous; computed in float32.
    """
    columns = x.shape[-1]
    assert block & (block - 1) == 0, block
    assert 0 < block <= LARGEST_BLOCK, block
    assert columns % block == 0, (columns, block)
    rows = x.reshape(-1, columns)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        warps = min(max(block // 512, 1), 8)
        grid, scale = (len(rows), columns // block), block**-0.5
        hadamard_kernel[grid](rows, out, rows.stride(0), columns, scale, BLOCK=block, num_warps=warps)
    return out.view(x.shape)
