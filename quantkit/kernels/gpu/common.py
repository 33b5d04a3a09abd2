"""What several rooms of the GPU kernels share: rounding, and whether Triton compiles or interprets."""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Added to a float32 below 2^22, it leaves no bits for a fraction: 1.5 * 2^23.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_half_even(x):  # type: ignore[no-untyped-def]
    """The nearest whole number of a float32 below 2^22, ties to even: with 1.5 * 2^23 added, no bits are left for a
    fraction.
    """
    return (x + 12582912.0) - 12582912.0


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors, instead of compiling them."""
    return not isinstance(round_half_even, triton.JITFunction)


def uses_ptx() -> bool:
    """Whether kernels are compiled to PTX: not under Triton's interpreter, whose 16-bit arithmetic is wrong, nor on AMD
    GPUs.
    """
    return not interpreted() and torch.version.hip is None


def computes_in_float32(x: Tensor) -> bool:
    """Whether kernels must convert `x` to float32 first: the interpreter's bfloat16 arithmetic is wrong."""
    return interpreted() and x.dtype == torch.bfloat16
