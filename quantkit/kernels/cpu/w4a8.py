"""Packed matrices times activations that are rounded to integers, on a CPU: what a QSpec draft computes.

Integers of 4 bits are multiplied as integers of 8: processors have no smaller ones, so they cost the same and are worse.
"""

from torch import Tensor

from quantkit.kernels import reference
from quantkit.kernels.cpu import library
from quantkit.kernels.cpu import matmul as cpu_matmul
from quantkit.kernels.cpu.matmul import CpuWeight


def w4a8_matmul(x: Tensor, weight: CpuWeight, activation_bits: int, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with every row of x rounded to integers (see `reference.quantized_matmul`).

    Args:
        x: [M, K] in float32, bfloat16 or float16, finite.
        weight: from `cpu_matmul.pack`.
        activation_bits: 4 or 8.
        bias: [N] in any floating type.

    Returns:
        [M, N] in x's dtype. Natively sums within a group are exact integers; torch's fall-backs multiply the integers as
        `cpu_matmul.matmul` multiplies any x.
    """
    assert activation_bits in (4, 8), activation_bits
    assert weight.layout != "dense"
    lib = library.load()
    if lib is not None and weight.layout == "tiles":
        return cpu_matmul.native_matmul(lib, x, weight, bias, activation_bits)
    codes, scales = reference.quantize_rows(x, activation_bits)
    out = cpu_matmul.matmul(codes.float(), weight) * scales[:, None]
    return out.to(x.dtype) if bias is None else (out + bias).to(x.dtype)
