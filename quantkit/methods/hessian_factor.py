"""The factored inverse Hessian that GPTQ rounds with."""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Damping starts at the recipe's fraction of the mean diagonal and grows by this factor until the factorization succeeds.
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
        """1 / U[j, j]^2, float32 [K] in the original order: the loss of a unit error in column j once the columns after it
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

    Dead inputs (zero diagonal) get a unit diagonal: their weights cost nothing and do not affect other columns.
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
        # One buffer holds factor, inverse and the inverse's factor in turn; LAPACK works on the transposed view.
        factor = damped[order[:, None], order].mT
        if factor_in_place(factor):
            torch.cholesky_inverse(factor, out=factor)
            if factor_in_place(factor, upper=True) and bool(factor.isfinite().all()):
                return HessianFactor(order, factor, damped, damping)
        if damping >= LARGEST_DAMPING:
            return None
        damping = min(damping * DAMPING_STEP, LARGEST_DAMPING)


def factor_in_place(matrix: Tensor, *, upper: bool = False) -> bool:
    """Replace a symmetric matrix, stored column-major, by its Cholesky factor. Returns False where it has none."""
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, failed))
    return not failed
