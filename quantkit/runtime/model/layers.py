"""The layers that replace transformers' own when a model is loaded: linear layers over packed weights, embedding and norm.

The kernel that multiplies a weight follows from its device and its packing. No other module of the runtime needs to know.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantkit.kernels.cpu import hadamard as cpu_hadamard
from quantkit.kernels.cpu import matmul as cpu_matmul
from quantkit.kernels.cpu import w4a8 as cpu_w4a8
from quantkit.kernels.layouts.planes import PlaneWeight, fits, to_planes
from quantkit.methods.grid import QuantizedWeight

#: A weight in the layout of its kernel: native tiles or rows on a CPU, planes or a plain [N, K] tensor on a GPU.
Weight = cpu_matmul.CpuWeight | PlaneWeight | Tensor


def pack_weight(weight: QuantizedWeight | Tensor, device: torch.device, dtype: torch.dtype) -> Weight:
    """Repack a weight for the kernels of `device`; dequantize it if no kernel there supports its group size.

    Args:
        weight: quantized, or dense [N, K] in 16 or 32 bit.
        device: where it will be.
        dtype: of activations on a GPU; on a CPU activations are always float32.
    """
    if isinstance(weight, Tensor):
        return cpu_matmul.pack_dense(weight) if device.type == "cpu" else weight.to(device, dtype)
    scheme, columns = weight.scheme, weight.codes.shape[1]
    group_size = scheme.group_columns(columns)
    if device.type == "cpu":
        return cpu_matmul.pack(weight.codes, weight.scales, weight.zeros, scheme.bits, group_size)
    if not fits(columns, scheme.group_size):
        return weight.dequantize().to(device, dtype)
    codes, scales, zeros = weight.codes.to(device), weight.scales.to(device), weight.zeros.to(device)
    return to_planes(codes, scales, zeros, scheme.bits, group_size, dtype)


def is_packed(weight: Weight) -> bool:
    """Whether the weight is quantized."""
    return isinstance(weight, PlaneWeight) or (isinstance(weight, cpu_matmul.CpuWeight) and weight.layout != "dense")


def multiply(x: Tensor, weight: Weight, bias: Tensor | None, activation_bits: int = 0) -> Tensor:
    """x W^T + bias for x [..., K]; the result is [..., N] in x's dtype.

    Args:
        activation_bits: 4 or 8 quantizes x to that many bits (see `reference.w4a8_matmul`), for packed weights only; 0
            does not.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Tensor):
        out = nn.functional.linear(rows, weight, bias)
    elif isinstance(weight, PlaneWeight):
        out = _multiply_planes(rows, weight, bias, activation_bits)
    elif activation_bits:
        out = cpu_w4a8.w4a8_matmul(rows, weight, activation_bits, bias)
    else:
        out = cpu_matmul.matmul(rows, weight, bias)
    return out.view(*x.shape[:-1], out.shape[-1])


def _multiply_planes(x: Tensor, weight: PlaneWeight, bias: Tensor | None, activation_bits: int) -> Tensor:
    """`multiply` on a GPU. Triton is imported here because it is slow to import and exists on Linux only."""
    if activation_bits:
        from quantkit.kernels.gpu.matmul.w4a8_gemm import w4a8_matmul

        return w4a8_matmul(x, weight, activation_bits, bias)
    from quantkit.kernels.gpu.matmul.dequant_matmul import dequant_matmul

    return dequant_matmul(x, weight, bias)


def rotate(x: Tensor, block: int) -> Tensor:
    """The Hadamard transform of every run of `block` elements in x [..., K]; see `reference.hadamard`."""
    if x.device.type == "cpu":
        return cpu_hadamard.hadamard(x, block)
    from quantkit.kernels.gpu.matmul.hadamard import hadamard

    return hadamard(x, block)


class Linear(nn.Module):
    """y = x[..., column_perm] W^T + bias, where x is rotated first if the weight was.

    Attributes:
        kernel_weight: see `pack_weight`.
        bias: [N] or None.
        column_perm: int64 [K], the column of x that each column of W multiplies, if groups were formed on permuted columns.
        hadamard: block size of the Hadamard transform that is applied to x first; 0 for none.
        activation_bits: bits that x is quantized to, see `multiply`. 0 except inside `quantized_activations`.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None, column_perm: Tensor | None = None) -> None:
        super().__init__()
        self.kernel_weight, self.bias, self.column_perm = weight, bias, column_perm
        self.hadamard = self.activation_bits = 0

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        rotated = rotate(x, self.hadamard) if self.hadamard else x
        ordered = rotated if self.column_perm is None else rotated[..., self.column_perm]
        return multiply(ordered, self.kernel_weight, self.bias, self.activation_bits)


def head_bits(activation_bits: int) -> int:
    """Bits of the inputs of the head if those of other layers have `activation_bits`; 0 is not quantized.

    The head gets 8 bits: an error of 4 bits directly in the logits often changes the most probable token.
    """
    return 8 if activation_bits else 0


@contextmanager
def quantized_activations(linears: Iterable[Linear], head: nn.Module, activation_bits: int) -> Iterator[None]:
    """Within the context, layers with packed weights quantize their inputs to `activation_bits`, the head to `head_bits`."""
    layers = [linear for linear in linears if is_packed(linear.kernel_weight)]
    for linear in layers:
        linear.activation_bits = head_bits(activation_bits) if linear is head else activation_bits
    try:
        yield
    finally:
        for linear in layers:
            linear.activation_bits = 0


class FusedSlice(nn.Module):
    """One of several matrices that read the same input and were fused: returns its slice of the fused product.

    transformers calls q, k and v (or gate and up) one after another with the same tensor. The first computes the product; the
    others take their slices, and the last releases it.
    """

    def __init__(self, fused: "FusedLinear", index: int) -> None:
        super().__init__()
        self.fused, self.index = fused, index

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N of this matrix]."""
        return self.fused.slice(x, self.index)


class FusedLinear:
    """Several matrices as one, and the slices of its product that were not asked for yet.

    Attributes:
        linear: the fused matrix.
        sizes: rows of each matrix, in the order in which the model calls them.
    """

    def __init__(self, linear: Linear, sizes: Sequence[int]) -> None:
        self.linear, self.sizes = linear, tuple(sizes)
        self._input: Tensor | None = None
        self._slices: list[Tensor] = []

    def slices(self) -> list[FusedSlice]:
        """One module per matrix."""
        return [FusedSlice(self, index) for index in range(len(self.sizes))]

    def slice(self, x: Tensor, index: int) -> Tensor:
        """Slice `index` of the product with x."""
        if index == 0:
            self._input, self._slices = x, list(self.linear(x).split(self.sizes, dim=-1))
        assert self._input is x, "slices of a fused matrix were called with different inputs, or out of order"
        taken = self._slices[index]
        if index == len(self.sizes) - 1:
            self._input, self._slices = None, []
        return taken


class Embedding(nn.Module):
    """Looks up rows of a table in its stored dtype, and converts them to the dtype that the model computes in.

    Attributes:
        weight: [V, D].
        dtype: of the result.
        scale: factor of the embeddings; 1 in most families.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, scale: float) -> None:
        super().__init__()
        self.weight, self.dtype, self.scale = weight, dtype, scale

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., D]."""
        rows = nn.functional.embedding(tokens, self.weight).to(self.dtype)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=self.dtype)


class Norm(nn.Module):
    """RMS norm in one call: x / rms(x) * weight over the last dimension. The weight includes the family's offset."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
