"""GPTQ: quantize one column at a time and let the columns not yet quantized absorb the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323),
Algorithm 1: with U the upper Cholesky factor of H^-1, column j rounds to q_j and every later column k moves by
-(w_j - q_j) * U[j, k] / U[j, j]. Updates inside a run of columns are applied at once, the rest of the matrix once a run.

All rows are independent given H, so matrices that read the same input are solved stacked. Work is transposed, [K, N], so
that a column is one contiguous run of memory. The loops over columns run in one thread: in two they took 5% more of a whole
run's processor time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.methods.grid import QuantizedWeight, search_qparams, storable_scales
from quantkit.methods.scheme import Scheme
from quantkit.methods.threads import one_thread

#: Columns whose updates to the rest of the matrix are applied together (the paper's B, there 128).
BLOCK_COLUMNS = 32

#: Damping starts at the recipe's fraction of the mean diagonal and grows by this factor until the factorisation succeeds.
DAMPING_STEP = 10.0
LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class HessianFactor:
    """Factor of a damped inverse Hessian.

    Attributes:
        order: int64 [K], column processed at each step.
        upper: float32 [K, K], upper Cholesky factor of H^-1 in that order.
        hessian: float32 [K, K], the damped H in the original order.
        damping: the fraction of the mean diagonal that was added.
    """

    order: Tensor
    upper: Tensor
    hessian: Tensor
    damping: float

    @property
    def cost(self) -> Tensor:
        """1 / U[j, j]^2, float32 [K] in the original order: the loss of a unit error in column j once the columns behind it
        have absorbed their share."""
        cost = torch.empty_like(self.upper[0])
        cost[self.order] = self.upper.diagonal().square().reciprocal()
        return cost

    def divided_by(self, scale: Tensor) -> "HessianFactor":
        """The same for inputs divided by `scale`, float32 [K] > 0: with D = diag(scale), (D^-1 H D^-1)^-1 = (U D)^T (U D)."""
        upper = self.upper * scale[self.order]
        return HessianFactor(self.order, upper, self.hessian / (scale[:, None] * scale), self.damping)


def factorize(hessian: Tensor, damping: float, act_order: bool) -> HessianFactor | None:
    """Damp, order and factor `hessian` (float32 [K, K]); None when no damping up to 1.0 makes it positive definite.

    Dead inputs (zero diagonal) get a unit diagonal: their weights cost nothing and disturb nobody.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.mean().clamp_(min=torch.finfo(torch.float32).tiny)
    alive = diagonal + dead * mean
    order = torch.argsort(alive, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(hessian.device)
    while True:
        damped = hessian.clone()
        damped.diagonal().copy_(alive + damping * mean)
        # One matrix becomes factor, inverse and its factor in turn. As a view of its transpose it is what LAPACK works on.
        factor = damped[order[:, None], order].mT
        if factor_in_place(factor):
            torch.cholesky_inverse(factor, out=factor)
            if factor_in_place(factor, upper=True) and bool(factor.isfinite().all()):
                return HessianFactor(order, factor, damped, damping)
        if damping >= LARGEST_DAMPING:
            return None
        damping = min(damping * DAMPING_STEP, LARGEST_DAMPING)


def factor_in_place(matrix: Tensor, *, upper: bool = False) -> bool:
    """Put the Cholesky factor of a symmetric matrix, stored by columns, in its place; False where it has none."""
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, failed))
    return not failed


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
        inverse: from `factorize`, K columns.
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


@one_thread()
def coordinate_descent(
    weight: Tensor, start: QuantizedWeight, hessian: Tensor, dtype: torch.dtype, passes: int
) -> QuantizedWeight:
    """Lower tr(E H E^T), E = weight - dequantized, by exact coordinate steps over scales, zero points and codes.

    GPTQ never looks back: a code chosen early is final, and so are the scales. Here every group in turn refits its scale
    (the least-squares scale for its codes, rounded to storage), tries the two neighbouring zero points, and then moves
    each code to the grid point nearest its own minimiser, w'_k + (E H)_k / H_kk. Every step is accepted only where it
    lowers the objective, so the result is never worse than `start`.

    Args:
        weight: float32 [N, K], the target.
        start: the codes and grids to begin with.
        hessian: float32 [K, K], damped, so that no diagonal is zero.
        dtype: the artifact's 16-bit type.
        sweeps: passes over all columns.
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
            scales[group], zeros[group] = _refit(codes[part], scales[group], zeros[group], local, block, scheme, dtype)
            now = (codes[part] - zeros[group]) * scales[group]
            local.addmm_(block, now - before, alpha=-1)
            _settle(codes[part], now, scales[group], zeros[group], local, block, scheme.levels)
            # pull = H @ error holds again for the groups to come.
            moved, rest = now.sub_(before), slice(first + width, None)
            pull[rest].addmm_(hessian[rest, part], moved, alpha=-1)
            error[part] -= moved
    return QuantizedWeight(
        codes.T.contiguous().to(torch.uint8), scales.T.contiguous(), zeros.T.contiguous().to(torch.uint8), scheme
    )


def _refit(
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


def _settle(codes: Tensor, values: Tensor, scale: Tensor, zero: Tensor, pull: Tensor, block: Tensor, levels: int) -> None:
    """One pass of coordinate descent over the codes of a group; updates codes, values and, where it is still to be read, pull
    in place ([g, N] each)."""
    rows = zip(codes, values, pull, block.diagonal().tolist(), strict=True)
    for k, (code, value, drawn, curvature) in enumerate(rows):
        torch.add(value, drawn, alpha=1 / curvature, out=code).div_(scale).round_().add_(zero).clamp_(0, levels)
        settled = (code - zero).mul_(scale)
        pull[k + 1 :].addr_(block[k, k + 1 :], settled - value, alpha=-1)
        value.copy_(settled)
