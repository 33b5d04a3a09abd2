"""AWQ: scale up the important input channels before rounding, and divide the producer of the input by the same scale.

Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978). The published search runs the module again for
every candidate. The squared output error that it measures is tr(dW H dW^T), so here each candidate costs one product with H.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.methods.base import CLIP_RATIOS, InputStats, Method, SolverSettings
from quantkit.methods.grid import QuantizedWeight, minmax_qparams, round_to_grid
from quantkit.methods.products import output_error
from quantkit.methods.rtn import quantize_on_grid, rtn
from quantkit.methods.scheme import Scheme

#: Rows whose loss is computed at once: 256 rows of a 1,000-column matrix stay in a core's cache.
_SLICE_ROWS = 256

#: Exponents of the activation magnitude, from 0 (no scaling) to just below 1. Every other one is tried first, then the
#: neighbours of the best.
RATIOS = tuple(i / 20 for i in range(20))


@dataclass(frozen=True)
class ChannelScale:
    """Result of the search for a channel scale.

    Attributes:
        scale: float32 [K] > 0; weights are multiplied by it, the input is divided by it. All ones when nothing helps.
        ratio: the exponent of the activation magnitude.
        error: the loss relative to no scaling.
    """

    scale: Tensor
    ratio: float
    error: float


def search_channel_scale(
    parts: Sequence[tuple[Tensor, Scheme]],
    hessian: Tensor,
    dtype: torch.dtype,
    channel_groups: Tensor,
    column_costs: Tensor | None = None,
    parallel_map: Callable[[Callable[[float], float], Sequence[float]], Iterable[float]] = map,
    product_dtype: torch.dtype = torch.float32,
) -> ChannelScale:
    """Best s = rms(x)^ratio for the matrices that read x.

    Args:
        parts: (weight float32 [N_i, K], scheme) of every matrix that reads x and is quantized.
        hessian: float32 [K, K]; its diagonal is the mean square of each input channel.
        dtype: the artifact's 16-bit type.
        channel_groups: int64 [K]; channels with the same number share a scale (repeated KV heads feed several query heads).
        column_costs: float32 [K], the loss that an error in each column causes in GPTQ (`HessianFactor.cost`); None for plain
            rounding. A scale that is best for rounding can be worse than none where the error is compensated.
        parallel_map: like `map`; may spread the candidates over processes.
        product_dtype: the dtype in which errors of rounding are multiplied with the Hessian (`fastest_products`).
    """
    count = int(channel_groups.max()) + 1
    power = torch.zeros(count, device=hessian.device).index_add_(0, channel_groups, hessian.diagonal())
    magnitude = (power / torch.bincount(channel_groups, minlength=count).clamp_(min=1)).sqrt_()
    floor = float(magnitude.max()) * 1e-4 + torch.finfo(torch.float32).tiny
    magnitude = magnitude.clamp_(min=floor)[channel_groups]

    def loss(ratio: float) -> float:
        scale = _normalized(magnitude, ratio)
        if column_costs is None:
            changes = (_rounding_errors(weight, scale, scheme, dtype) for weight, scheme in parts)
            return sum((output_error(change, hessian, product_dtype) for change in changes), 0.0)
        return sum((_compensated_loss(weight, scale, column_costs, scheme) for weight, scheme in parts), 0.0)

    errors: dict[float, float] = {}

    def best_of(ratios: Sequence[float]) -> float:
        errors.update(zip(ratios, parallel_map(loss, ratios), strict=True))
        return min(errors, key=errors.__getitem__)

    middle = RATIOS.index(best_of(RATIOS[::2]))
    best = best_of([RATIOS[near] for near in (middle - 1, middle + 1) if 0 <= near < len(RATIOS)])
    return ChannelScale(_normalized(magnitude, best), best, errors[best] / max(errors[0.0], 1e-30))


def _rounding_errors(weight: Tensor, scale: Tensor, scheme: Scheme, dtype: torch.dtype) -> Iterator[Tensor]:
    """The change from rounding weight * scale to nearest and dividing by scale again, slice by slice in cache."""
    groups = scheme.groups(weight.shape[1])
    for part in weight.split(_SLICE_ROWS):
        scaled = (part * scale).view(len(part), groups, -1)
        low, high = scaled.amin(-1).clamp_(max=0), scaled.amax(-1).clamp_(min=0)
        scales, zeros = (grid[..., None] for grid in minmax_qparams(low, high, scheme, dtype))
        codes = round_to_grid(scaled, scales, zeros, scheme.levels)
        yield codes.sub_(zeros).mul_(scales).view(part.shape).div_(scale).sub_(part)


def _compensated_loss(weight: Tensor, scale: Tensor, column_costs: Tensor, scheme: Scheme) -> float:
    """Expected loss of GPTQ on weight * scale: step^2 / 12, the variance of a rounding error, times the cost of its column.

    Dividing the input by s multiplies row and column j of H^-1 by s_j, and so divides the cost of column j by s_j^2.
    """
    rows, groups = len(weight), scheme.groups(weight.shape[1])
    scaled = (weight * scale).view(rows, groups, -1)
    low, high = scaled.amin(-1).clamp_(max=0), scaled.amax(-1).clamp_(min=0)
    steps = minmax_qparams(low, high, scheme, torch.float32)[0]
    return float((steps.square() * (column_costs / scale.square()).view(groups, -1).sum(-1)).sum()) / 12


def _normalized(magnitude: Tensor, ratio: float) -> Tensor:
    """magnitude^ratio, normalized so that the geometric mean of its extremes is 1: neither end leaves the 16-bit range."""
    scale = magnitude**ratio
    return scale / (scale.max() * scale.min()).sqrt()


def quantize_clipped(
    weight: Tensor, hessian: Tensor, scheme: Scheme, dtype: torch.dtype, clip_ratios: tuple[float, ...]
) -> QuantizedWeight:
    """Round to nearest, with every group's range clipped as in AWQ: by the ratio with the least output error <dw, H_gg dw>."""
    rows, columns = weight.shape
    groups, width = scheme.groups(columns), scheme.group_columns(columns)
    grouped = weight.view(rows, groups, width).transpose(0, 1).contiguous()
    blocks = torch.stack([hessian[g * width : (g + 1) * width, g * width : (g + 1) * width] for g in range(groups)])
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    scales, zeros = minmax_qparams(low, high, scheme, dtype)
    least = torch.full_like(scales, torch.inf)
    for factor in clip_ratios:
        s, z = minmax_qparams(low * factor, high * factor, scheme, dtype)
        codes = round_to_grid(grouped, s[..., None], z[..., None], scheme.levels)
        change = codes.sub_(z[..., None]).mul_(s[..., None]).sub_(grouped)
        error = torch.bmm(change, blocks).mul_(change).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, s, scales), torch.where(better, z, zeros)
    return quantize_on_grid(weight, scheme, scales.T.contiguous(), zeros.T.contiguous())


def _quantize(target: Tensor, stats: InputStats | None, scheme: Scheme, settings: SolverSettings) -> QuantizedWeight:
    if stats is None:
        return rtn(target, scheme, settings.dtype)
    return quantize_clipped(target, stats.hessian, scheme, settings.dtype, CLIP_RATIOS)


METHOD = Method("awq", calibrates=True, scales_channels=True, compensates_errors=False, quantize=_quantize)
