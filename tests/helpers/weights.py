"""Random quantized matrices, and how far products with them may be off."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels import reference
from quantkit.kernels.layouts.planes import PlaneWeight, to_planes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Sample:
    """A matrix as codes [N, K], scales and zeros [N, G], and packed."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    planes: PlaneWeight

    def dense(self) -> Tensor:
        """The matrix dequantized by the reference, float32 [N, K]."""
        return reference.dequantize(self.codes, self.scales, self.zeros, self.planes.group_size)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The reference's product, float32."""
        return reference.dequant_matmul(x, self.codes, self.scales, self.zeros, self.planes.group_size, bias)


def sample(
    rows: int, columns: int, bits: int, group: int, dtype: torch.dtype = torch.float16, symmetric: bool = False, seed: int = 0
) -> Sample:
    """Codes over the whole range; scales within a factor of 4, which `dtype` holds exactly; zero points including both
    ends.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else columns // group
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) * 0.03 + 0.01).to(dtype).float()
    zeros = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8, generator=generator)
    zeros[0], zeros[-1] = 0, (1 << bits) - 1
    if symmetric:
        zeros.fill_(1 << (bits - 1))
    parts = codes.to(DEVICE), scales.to(DEVICE), zeros.to(DEVICE)
    return Sample(*parts, to_planes(*parts, bits, group, dtype))


def activations(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Normally distributed, with one channel 30 times larger, as in models."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[:, columns // 3] *= 30
    return x.to(DEVICE, dtype)


def assert_close(found: Tensor, x: Tensor, weight: Sample, bias: Tensor | None = None, *, rounded: bool = False) -> None:
    """Assert that `found` is the product, up to float32 sums in any order and one rounding of the result.

    Kernels multiply exact integers q - z and round nothing but sums. float32 sums of K terms are off by at most K * 2^-24 of
    the sum of magnitudes, and typically by sqrt(K) * 2^-24; 2^-19 of that sum covers K up to 32 in the worst case and about
    1000 typically. A matrix unit that truncates loses twice that. The result is rounded to x's type: half a unit in the last
    place, or a whole one, because the interpreter truncates. `rounded`: the weights were rounded to x's type, too.
    """
    wanted = weight.matmul(x, bias)
    step = torch.finfo(x.dtype).eps
    magnitude = x.float().abs() @ weight.dense().abs().T
    allowed = (2.0**-18 + rounded * step) * magnitude + step * wanted.abs() + torch.finfo(x.dtype).tiny
    assert found.dtype == x.dtype
    assert found.shape == wanted.shape
    worst = ((found.float() - wanted).abs() / allowed).max()
    assert worst <= 1, f"off by {worst:.2f} times what is allowed"
