"""GPTQ: quantize one column at a time and let the columns not yet quantized absorb the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323),
Algorithm 1: with U the upper Cholesky factor of H^-1, column j rounds to q_j and every later column k moves by
-(w_j - q_j) * U[j, k] / U[j, j]. Updates inside a block of columns are applied at once,
those to the rest of the matrix once per block.

Rows are independent given H, so matrices that read the same input are solved stacked. Work is transposed, [K, N], so that a
column is contiguous in memory. The loops over columns run in one thread: two threads took 5% more CPU time over a whole run.
"""

import torch
from torch import Tensor

from quantkit.methods.base import CLIP_RATIOS, InputStats, Method, SolverSettings
from quantkit.methods.coordinate_descent import coordinate_descent
from quantkit.methods.grid import QuantizedWeight, search_qparams
from quantkit.methods.hessian_factor import HessianFactor
from quantkit.methods.rtn import rtn
from quantkit.methods.scheme import Scheme
from quantkit.methods.threads import one_thread

#: Columns per block: their updates to the rest of the matrix are applied together (B in the paper, there 128).
BLOCK_COLUMNS = 32


@one_thread()
def gptq(
    weight: Tensor, factor: HessianFactor, scheme: Scheme, dtype: torch.dtype, clip_ratios: tuple[float, ...]
) -> QuantizedWeight:
    """Quantize `weight` so that the output error under `factor.hessian` is small.

    The grids are fixed first, on the given weights and in their original column order (static groups), each error
    weighted by 1 / U[j, j]^2, which is what GPTQ pays for it once later columns have absorbed their share. Act-order
    therefore changes no tensor's layout.

    Args:
        weight: float32 [N, K]; not modified.
        factor: from `factorize`, for K columns.
        scheme: the grid; its group size divides K.
        dtype: the artifact's 16-bit type.
        shrink: clipping factors tried for every group.
    """
    columns = weight.shape[1]
    order, upper = factor.order, factor.upper
    scales, zeros = search_qparams(weight, scheme, factor.cost, dtype, clip_ratios)
    group_of = (order // scheme.group_columns(columns)).tolist()
    left = weight.T[order].contiguous()
    codes = torch.empty_like(left)
    column_scales, column_zeros = scales.T.contiguous().unbind(), zeros.T.contiguous().unbind()
    pivots = upper.diagonal().tolist()
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        run, errors = left[start:stop], torch.empty_like(left[start:stop])
        for j, (column, code, error) in enumerate(zip(run, codes[start:stop], errors, strict=True)):
            scale, zero = column_scales[group_of[start + j]], column_zeros[group_of[start + j]]
            torch.div(column, scale, out=code).round_().add_(zero).clamp_(0, scheme.levels)
            torch.sub(code, zero, out=error).mul_(scale)
            torch.sub(column, error, out=error).div_(pivots[start + j])
            run[j + 1 :].addr_(upper[start + j, start + j + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    original = torch.empty_like(codes)
    original[order] = codes
    return QuantizedWeight(original.T.contiguous().to(torch.uint8), scales, zeros.to(torch.uint8), scheme)


def quantize_gptq(target: Tensor, stats: InputStats | None, scheme: Scheme, settings: SolverSettings) -> QuantizedWeight:
    """GPTQ, then coordinate descent if the settings ask for it; round to nearest where there is no factored Hessian."""
    factor = None if stats is None else stats.factor
    if factor is None:
        return rtn(target, scheme, settings.dtype)
    quantized = gptq(target, factor, scheme, settings.dtype, CLIP_RATIOS)
    passes = settings.descent_passes(scheme.bits)
    return coordinate_descent(target, quantized, factor.hessian, settings.dtype, passes) if passes else quantized


METHOD = Method("gptq", calibrates=True, scales_channels=False, compensates_errors=True, quantize=quantize_gptq)
