"""Packed weights times activations that are quantized to integers, on a CPU: what a QSpec draft computes.

4-bit activations are multiplied as 8-bit integers, because processors have no smaller ones: they are no faster, and less
accurate.
"""

from torch import Tensor

from quantkit.kernels import reference
from quantkit.kernels.cpu import library
from quantkit.kernels.cpu import matmul as cpu_matmul
from quantkit.kernels.cpu.matmul import CpuWeight


def w4a8_matmul(x: Tensor, weight: CpuWeight, activation_bits: int, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, with every row of x quantized to integers (see `reference.w4a8_matmul`).

    Args:
        x: [M, K] in float32, bfloat16 or float16, finite.
        weight: from `matmul.pack`.
        activation_bits: 4 or 8.
        bias: [N] in any floating type.

    Returns:
        [M, N] in x's dtype. In the native kernel, sums within a group are exact integers. Without it, `matmul.matmul`
        multiplies the integers like any other x.
    """
    assert activation_bits in (4, 8), activation_bits
    assert weight.layout != "dense"
    lib = library.load()
    if lib is not None and weight.layout == "tiles":
        return cpu_matmul.native_matmul(lib, x, weight, bias, activation_bits)
    codes, scales = reference.quantize_rows(x, activation_bits)
    out = cpu_matmul.matmul(codes.float(), weight) * scales[:, None]
    return out.to(x.dtype) if bias is None else (out + bias).to(x.dtype)
