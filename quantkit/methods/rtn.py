"""Round to nearest (RTN): the baseline that other methods improve on."""

import torch
from torch import Tensor

from quantkit.methods.base import InputStats, Method, SolverSettings
from quantkit.methods.grid import QuantizedWeight, round_to_grid, search_qparams
from quantkit.methods.scheme import Scheme


def quantize_on_grid(weight: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor) -> QuantizedWeight:
    """Nearest codes of `weight` (float32 [N, K]) for given scales and zero points (float32 [N, G])."""
    rows, columns = weight.shape
    grouped = weight.view(rows, scales.shape[1], -1)
    codes = round_to_grid(grouped, scales[..., None], zeros[..., None], scheme.levels)
    return QuantizedWeight(codes.view(rows, columns).to(torch.uint8), scales, zeros.to(torch.uint8), scheme)


def rtn(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """Round `weight` (float32 [N, K]) to the nearest codes of min/max grids.

    `dtype` is the artifact's 16-bit type, to which scales are rounded.
    """
    uniform = torch.ones(weight.shape[1], device=weight.device)
    scales, zeros = search_qparams(weight, scheme, uniform, dtype, clip_ratios=(1.0,))
    return quantize_on_grid(weight, scheme, scales, zeros)


def _quantize(target: Tensor, _stats: InputStats | None, scheme: Scheme, settings: SolverSettings) -> QuantizedWeight:
    return rtn(target, scheme, settings.dtype)


METHOD = Method("rtn", calibrates=False, scales_channels=False, compensates_errors=False, quantize=_quantize)
