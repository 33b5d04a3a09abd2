"""Random problems for the methods, and what every answer must satisfy."""

from itertools import product

import torch
from torch import Tensor

from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.scheme import Scheme

#: Every kind of grid over 96 or 160 columns: both are multiples of 16 and 32 and of no run of 128.
SCHEMES = [Scheme(*choice) for choice in product((2, 3, 4, 8), (16, 32, -1), (True, False))]


def activations(columns: int, tokens: int = 512, seed: int = 0) -> Tensor:
    """Correlated inputs [tokens, columns], a few channels of which are ten times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator)
    mixed += torch.randn(tokens, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    loud = 1 + 9 * (torch.rand(columns, generator=generator) < 0.05)
    return mixed * loud


def second_moment(inputs: Tensor) -> Tensor:
    """X^T X / T, summed in float64."""
    x = inputs.double()
    return (x.T @ x / len(x)).float()


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A weight matrix [rows, columns] whose groups lie off centre, as asymmetric grids like it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) + 0.5 * torch.randn(rows, 1, generator=generator)


def loss(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """tr(dW H dW^T) in float64."""
    change = quantized.dequantize().double() - weight.double()
    return float(((change @ hessian.double()) * change).sum())


def assert_sound(quantized: QuantizedWeight, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Shapes, ranges and storability that every format relies on."""
    scheme, groups = quantized.scheme, quantized.scheme.groups(columns)
    assert quantized.codes.shape == (rows, columns)
    assert quantized.scales.shape == quantized.zeros.shape == (rows, groups)
    assert quantized.codes.dtype == quantized.zeros.dtype == torch.uint8
    assert int(quantized.codes.max()) <= scheme.levels
    assert int(quantized.zeros.max()) <= scheme.levels
    if scheme.symmetric:
        assert bool((quantized.zeros == 1 << (scheme.bits - 1)).all())
    assert_storable(quantized.scales, dtype)


def assert_storable(scales: Tensor, dtype: torch.dtype) -> None:
    """Scales survive the artifact's dtype, and float16 besides, unchanged; none is zero."""
    assert scales.dtype == torch.float32
    assert bool((scales != 0).all())
    assert torch.equal(scales, scales.half().float())
    if dtype != torch.float16:
        assert torch.equal(scales, scales.bfloat16().float())
