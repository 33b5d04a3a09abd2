"""The integer grid: quantized weights, and the search for the scales of least error.

A weight matrix W [N out, K in] is cut along K into groups of `group_size` columns. Every (row, group) has a scale s and
an integer zero point z, and stores codes q in [0, 2^bits - 1]; its value is (q - z) * s. Symmetric grids fix
z = 2^(bits - 1).

Scales are rounded to the 16-bit type of the artifact *before* codes are chosen, so the codes also minimise the
error of rounding the scale, which would otherwise come on top.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.methods.scheme import Scheme

#: Smallest scale that both bfloat16 and float16 hold exactly: float16's smallest subnormal.
SMALLEST_SCALE = 2.0**-24

#: Largest scale that both hold: bfloat16's last value below float16's maximum.
LARGEST_SCALE = 65280.0

#: Weights whose grids are searched at once. So few stay in cache over a dozen passes, and torch gives them to one thread:
#: with two, each of thousands of passes would wait for the slower thread.
_SLICE_WEIGHTS = 1 << 15


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix: what every method returns and every format stores.

    Attributes:
        codes: uint8 [N, K], in [0, 2^bits - 1].
        scales: float32 [N, G]; every value is exact in the artifact's 16-bit type.
        zeros: uint8 [N, G], the zero points in [0, 2^bits - 1].
        scheme: bits, group size and symmetry.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: Scheme

    @classmethod
    def empty(cls, shape: torch.Size, scheme: Scheme, device: torch.device) -> "QuantizedWeight":
        """An uninitialized weight of `shape` [N, K], to be filled."""
        rows, columns = shape
        groups = scheme.groups(columns)
        codes = torch.empty(rows, columns, dtype=torch.uint8, device=device)
        zeros = torch.empty(rows, groups, dtype=torch.uint8, device=device)
        return cls(codes, torch.empty(rows, groups, device=device), zeros, scheme)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(codes - zeros) * scales as `dtype` [N, K]; computed in float32, rounded once."""
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scales.shape[1], -1).float()
        values = (grouped - self.zeros[..., None].float()) * self.scales[..., None]
        return values.view(rows, columns).to(dtype)

    def scale_rows(self, factor: Tensor, scale_dtype: torch.dtype) -> "QuantizedWeight":
        """The same codes with row i multiplied by factor[i] (float32 [N] > 0), rounded again to storable scales."""
        return replace(self, scales=storable_scales(self.scales * factor[:, None], scale_dtype))

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """Rows start..stop, for one of several matrices that were quantized stacked."""
        return replace(
            self,
            codes=self.codes[start:stop].contiguous(),
            scales=self.scales[start:stop].contiguous(),
            zeros=self.zeros[start:stop].contiguous(),
        )


def storable_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales (either sign, not zero) to what the artifact can hold; float32 in, float32 out.

    For bfloat16 models the result is exact in bfloat16 *and* float16, so an artifact converts between the three formats,
    and loads under either dtype, without a change in value. float16 models round to float16 alone.
    """
    if dtype != torch.float16:
        scales = scales.bfloat16().float()
    size = scales.abs().half().float().clamp_(min=SMALLEST_SCALE, max=LARGEST_SCALE)
    return torch.copysign(size, scales)


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    """Nearest codes (float32) of `weight`; all arguments broadcast."""
    return (weight / scales).round_().add_(zeros).clamp_(0, levels)


def minmax_qparams(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zero points (both float32) of grids that span low..high, where low <= 0 <= high.

    A symmetric grid reaches one step further below zero than above it, so the scale takes the sign that puts the longer
    half under the larger end: at 2 bits that is worth a quarter of the range.
    """
    if scheme.symmetric:
        half = 1 << (scheme.bits - 1)
        flipped = high > -low
        long, short = torch.where(flipped, high, -low), torch.where(flipped, -low, high)
        size = torch.maximum(long / half, short / (half - 1)).clamp_(min=SMALLEST_SCALE)
        scales = storable_scales(torch.where(flipped, -size, size), dtype)
        return scales, torch.full_like(scales, half)
    scales = storable_scales(((high - low) / scheme.levels).clamp_(min=SMALLEST_SCALE), dtype)
    return scales, (-low / scales).round_().clamp_(0, scheme.levels)


def search_qparams(
    weight: Tensor, scheme: Scheme, importance: Tensor, dtype: torch.dtype, clip_ratios: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of the clipped range with the least weighted rounding error.

    Every (row, group) tries its min..max range multiplied by each factor of `clip_ratios` and keeps the one that minimises
    sum_k importance[k] * (w[k] - grid(w[k]))^2.

    Args:
        weight: float32 [N, K].
        scheme: the grid; its group size divides K.
        importance: float32 [K], non-negative.
        dtype: the artifact's 16-bit type.
        shrink: factors in (0, 1]; (1.0,) is plain min/max rounding.

    Returns:
        scales and zeros, float32 [N, G].
    """
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    best_scales = torch.empty(rows, groups, device=weight.device)
    best_zeros = torch.empty_like(best_scales)
    cost = importance.view(1, groups, -1)
    step = max(1, _SLICE_WEIGHTS // columns)
    for start in range(0, rows, step):
        grouped = weight[start : start + step].view(-1, groups, columns // groups)
        low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
        least: Tensor | None = None
        for factor in clip_ratios:
            scales, zeros = minmax_qparams(low * factor, high * factor, scheme, dtype)
            codes = round_to_grid(grouped, scales[..., None], zeros[..., None], scheme.levels)
            values = codes.sub_(zeros[..., None]).mul_(scales[..., None])
            error = values.sub_(grouped).square_().mul_(cost).sum(-1)
            if least is None:
                least, kept_scales, kept_zeros = error, scales, zeros
            else:
                better = error < least
                least = torch.where(better, error, least)
                kept_scales = torch.where(better, scales, kept_scales)
                kept_zeros = torch.where(better, zeros, kept_zeros)
        best_scales[start : start + step], best_zeros[start : start + step] = kept_scales, kept_zeros
    return best_scales, best_zeros
