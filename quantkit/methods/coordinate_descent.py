"""Coordinate descent over scales, zero points and codes: improves what GPTQ found."""

import torch
from torch import Tensor

from quantkit.methods.grid import QuantizedWeight, storable_scales
from quantkit.methods.scheme import Scheme
from quantkit.methods.threads import one_thread


@one_thread()
def coordinate_descent(
    weight: Tensor, start: QuantizedWeight, hessian: Tensor, dtype: torch.dtype, passes: int
) -> QuantizedWeight:
    """Lower tr(E H E^T), E = weight - dequantized, by exact coordinate steps over scales, zero points and codes.

    GPTQ never revisits a code or a scale once it is chosen. Here every group in turn refits its scale
    (the least-squares scale for its codes, rounded to storage), tries the two neighbouring zero points, and then moves
    each code to the grid point nearest its own minimiser, w'_k + (E H)_k / H_kk. Every step is accepted only where it
    lowers the objective, so the result is never worse than `start`.

    Args:
        weight: float32 [N, K], the target.
        start: the quantized weight to improve.
        hessian: float32 [K, K], damped, so that no diagonal is zero.
        dtype: the artifact's 16-bit type.
        passes: passes over all columns.
    """
    columns = weight.shape[1]
    scheme, width = start.scheme, start.scheme.group_columns(columns)
    codes = start.codes.T.float().contiguous()
    scales, zeros = start.scales.T.contiguous().clone(), start.zeros.T.float().contiguous()
    error = (weight - start.dequantize()).T.contiguous()
    for _ in range(passes):
        pull = hessian @ error
        for group, first in enumerate(range(0, columns, width)):
            part = slice(first, first + width)
            block, local = hessian[part, part], pull[part].clone()
            before = (codes[part] - zeros[group]) * scales[group]
            scales[group], zeros[group] = _refit_qparams(codes[part], scales[group], zeros[group], local, block, scheme, dtype)
            now = (codes[part] - zeros[group]) * scales[group]
            local.addmm_(block, now - before, alpha=-1)
            _refine_codes(codes[part], now, scales[group], zeros[group], local, block, scheme.levels)
            # Keep pull = H @ error true for the groups that follow.
            moved, rest = now.sub_(before), slice(first + width, None)
            pull[rest].addmm_(hessian[rest, part], moved, alpha=-1)
            error[part] -= moved
    return QuantizedWeight(
        codes.T.contiguous().to(torch.uint8), scales.T.contiguous(), zeros.T.contiguous().to(torch.uint8), scheme
    )


def _refit_qparams(
    codes: Tensor, scale: Tensor, zero: Tensor, pull: Tensor, block: Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Best stored scale for fixed codes, for the present zero point and (asymmetric) its two neighbours.

    codes [g, N]; scale, zero [N]; pull = (H E)[group] [g, N]; block = H[group, group]. Returns scale and zero [N].
    Moving the group's values by d changes the objective by -2 <pull, d> + <d, block d>.
    """
    present = (codes - zero) * scale
    best_gain = torch.zeros_like(scale)
    best_scale, best_zero = scale, zero
    for step in (0.0,) if scheme.symmetric else (0.0, -1.0, 1.0):
        shifted = (zero + step).clamp_(0, scheme.levels)
        shape = codes - shifted
        curved = block @ shape
        # The unrounded minimiser of |present + E - s * shape|^2 in the metric of the block.
        wanted = (shape * pull).sum(0) + (curved * present).sum(0)
        fitted = wanted / (curved * shape).sum(0).clamp_(min=torch.finfo(torch.float32).tiny)
        fitted = storable_scales(torch.where(fitted == 0, scale, fitted), dtype)
        move = shape * fitted - present
        gain = 2 * (pull * move).sum(0) - (move * (block @ move)).sum(0)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, fitted, best_scale)
        best_zero = torch.where(better, shifted, best_zero)
    return best_scale, best_zero


def _refine_codes(
    codes: Tensor, values: Tensor, scale: Tensor, zero: Tensor, pull: Tensor, block: Tensor, levels: int
) -> None:
    """One pass of coordinate descent over the codes of a group.

    Updates codes, values and the part of pull that is still to be read in place ([g, N] each).
    """
    rows = zip(codes, values, pull, block.diagonal().tolist(), strict=True)
    for k, (code, value, drawn, curvature) in enumerate(rows):
        torch.add(value, drawn, alpha=1 / curvature, out=code).div_(scale).round_().add_(zero).clamp_(0, levels)
        refined = (code - zero).mul_(scale)
        pull[k + 1 :].addr_(block[k, k + 1 :], refined - value, alpha=-1)
        value.copy_(refined)
