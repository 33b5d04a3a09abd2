"""Weights and inputs for the tests of CPU matrix products, and a comparison with sums of floats."""

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.native_cases import rounds_inputs
from quantkit.kernels import reference
from quantkit.kernels.cpu import matmul as cpu_matmul


@dataclass(frozen=True)
class Weight:
    """A quantized matrix: codes [N, K], scales and zeros [N, G]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int

    @property
    def dense(self) -> Tensor:
        """[N, K] in float32."""
        return reference.dequantize(self.codes, self.scales, self.zeros, self.group)


#: Numbers of rows on both sides of each switch between kernels: one, few, a panel, several panels.
ROWS = [1, 2, 3, 5, 6, 7, 16, 33, 200]

#: N, K, group: incomplete tiles, groups and words; groups longer than a run; an odd number of groups.
SHAPES = [(70, 576, 64), (33, 96, 32), (5, 100, 100), (64, 520, -1), (40, 60, 20), (96, 1536, 512), (1, 16, 16)]


def make_weight(rows: int, columns: int, group: int, bits: int = 4, symmetric: bool = False) -> Weight:
    """A random weight; the first row's zero points are 0, the last row's the largest."""
    generator = torch.Generator().manual_seed(rows + columns + bits)
    groups = 1 if group == -1 else columns // group
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) * 0.03 + 0.01).to(torch.bfloat16).float()
    zeros = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8, generator=generator)
    zeros[0], zeros[-1] = 0, (1 << bits) - 1
    return Weight(codes, scales, zeros.fill_(1 << (bits - 1)) if symmetric else zeros, bits, group)


def packed_weight(weight: Weight) -> cpu_matmul.CpuWeight:
    """The weight in the layout of the kernels that `library.load` gives."""
    return cpu_matmul.pack(weight.codes, weight.scales, weight.zeros, weight.bits, weight.group)


def make_rows(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed, with one channel 30 times larger, as in models."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x[:, columns // 3] *= 30
    return x.to(dtype)


def make_dense(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A dense weight of numbers of all sizes; some halves are subnormal."""
    generator = torch.Generator().manual_seed(rows + columns)
    sizes = 10.0 ** torch.randint(-7, 2, (rows, columns), generator=generator)
    return (torch.randn(rows, columns, generator=generator) * sizes).to(dtype)


def assert_dense_close(x: Tensor, weight: Tensor) -> None:
    """Assert that only sums are rounded, and inputs to the type of the weight where the processor multiplies bfloat16."""
    rounds = weight.dtype == torch.bfloat16 and rounds_inputs()
    used = (x.to(torch.bfloat16) if rounds else x).double()
    # float32 sums: at most K roundings of 2^-24 of the sum of magnitudes; a product of two bfloat16 is rounded, too.
    bound = 2 * x.shape[1] * 2.0**-24 * (used.abs() @ weight.double().abs().T)
    found = cpu_matmul.matmul(x, cpu_matmul.pack_dense(weight)).double()
    assert bool(((found - used @ weight.double().T).abs() <= bound).all())
