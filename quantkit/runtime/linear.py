"""A linear layer over kernel-ready weights: what replaces transformers' own when a model is loaded.

Which kernel serves a weight follows from where it lies and whether it is packed; nothing else in the runtime asks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantkit.kernels import cpu
from quantkit.kernels.planes import PlaneWeight, fits, to_planes
from quantkit.methods.grid import QuantizedWeight

#: A weight as its kernel wants it: native tiles or rows on a CPU, planes or a plain [N, K] tensor on a GPU.
Weight = cpu.CpuWeight | PlaneWeight | Tensor


def ready(weight: QuantizedWeight | Tensor, device: torch.device, dtype: torch.dtype) -> Weight:
    """A weight repacked once for the kernels of `device`; dequantized where no kernel there can hold its groups.

    Args:
        weight: quantized, or dense [N, K] in 16 or 32 bit.
        device: where it will live.
        dtype: of activations on a GPU; on a CPU activations are float32 whatever the weight is.
    """
    if isinstance(weight, Tensor):
        return cpu.pack_dense(weight) if device.type == "cpu" else weight.to(device, dtype)
    scheme, columns = weight.scheme, weight.codes.shape[1]
    parts = weight.codes, weight.scales, weight.zeros, scheme.bits, scheme.group_columns(columns)
    if device.type == "cpu":
        return cpu.pack(*parts)
    if not fits(columns, scheme.group_size):
        return weight.dequantize().to(device, dtype)
    codes, scales, zeros, bits, group_size = parts
    return to_planes(codes.to(device), scales.to(device), zeros.to(device), bits, group_size, dtype)


def multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x W^T + bias for x [..., K]; the result is [..., N] in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Tensor):
        out = nn.functional.linear(rows, weight, bias)
    elif isinstance(weight, PlaneWeight):
        from quantkit.kernels.dequant_matmul import dequant_matmul  # Triton is slow to import, and only Linux has it.

        out = dequant_matmul(rows, weight, bias)
    else:
        out = cpu.matmul(rows, weight, bias)
    return out.view(*x.shape[:-1], out.shape[-1])


class Linear(nn.Module):
    """y = x[..., order] W^T + bias.

    Attributes:
        kernel_weight: see `ready`.
        bias: [N] or None.
        order: int64 [K], the column of x that each column of W multiplies, where groups were formed on permuted columns.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None, order: Tensor | None = None) -> None:
        super().__init__()
        self.kernel_weight, self.bias, self.order = weight, bias, order

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return multiply(x if self.order is None else x[..., self.order], self.kernel_weight, self.bias)


class Member(nn.Module):
    """One of several matrices that read the same input and were merged: its slice of the merged product.

    transformers calls q, k and v (gate and up) one after another with the same tensor. The first computes all; the others
    take their slices, and the last lets go of them.
    """

    def __init__(self, merged: "Merged", index: int) -> None:
        super().__init__()
        self.merged, self.index = merged, index

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N of this member]."""
        return self.merged.slice(x, self.index)


class Merged:
    """Several matrices as one, and the slices of its product that were not asked for yet.

    Attributes:
        linear: the merged matrix.
        sizes: rows of each member, in the order in which the model calls them.
    """

    def __init__(self, linear: Linear, sizes: Sequence[int]) -> None:
        self.linear, self.sizes = linear, tuple(sizes)
        self._input: Tensor | None = None
        self._slices: list[Tensor] = []

    def members(self) -> list[Member]:
        """One module a member."""
        return [Member(self, index) for index in range(len(self.sizes))]

    def slice(self, x: Tensor, index: int) -> Tensor:
        """Member `index` of the product with x."""
        if index == 0:
            self._input, self._slices = x, list(self.linear(x).split(self.sizes, dim=-1))
        assert self._input is x, "members of a merged matrix were called with different inputs, or out of order"
        taken = self._slices[index]
        if index == len(self.sizes) - 1:
            self._input, self._slices = None, []
        return taken


class Embedding(nn.Module):
    """Rows of a table kept in its stored type, as the type that the model computes in.

    Attributes:
        weight: [V, D].
        dtype: of the result.
        scale: what the family multiplies its embeddings by.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, scale: float) -> None:
        super().__init__()
        self.weight, self.dtype, self.scale = weight, dtype, scale

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., D]."""
        rows = nn.functional.embedding(tokens, self.weight).to(self.dtype)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=self.dtype)


class Norm(nn.Module):
    """RMS norm in one call: x / rms(x) * weight over the last dimension, the family's offset folded into the weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
