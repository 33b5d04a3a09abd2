"""Asymmetric calibration: weights that give the original model's outputs from the quantized model's inputs.

Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration" (arXiv 2504.02692), solved as a
regression before rounding instead of during it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit.methods.hessian import Drift
from quantkit.methods.hessian_factor import factor_in_place

#: Ridge of the regression, as a fraction of the mean diagonal of H. The regression sees a share of the rows and overfits
#: without a ridge, the more the fewer the rows. On the quality base (4-bit symmetric, 64 rows of 512) an eighth of the rows
#: gives a KL divergence of 0.092 with a ridge of 0.5 and 0.086 with 1.0, as a quarter does with 0.5; 0.01 gives 0.17.
RIDGE = 1.0


def asymmetric_targets(weights: Iterable[Tensor], drift: Drift, strength: float) -> list[Tensor]:
    """The weights that give the original model's outputs from the quantized model's inputs, float32 [N, K] each.

    Ridge regression: W* = W + strength * W D^T (H + ridge)^-1 with D = X^T (X_ref - X) / T and H over the same tokens.
    Strength 1 corrects fully. Returns `weights` themselves where the regression cannot be solved.
    """
    factor = drift.hessian.clone().mT
    factor.diagonal().add_(RIDGE * drift.hessian.diagonal().mean())
    if strength == 0 or not factor_in_place(factor):
        return list(weights)
    targets = []
    for weight in weights:
        # Two triangular solves, because `cholesky_solve` copies the factor.
        half = torch.linalg.solve_triangular(factor, drift.cross @ weight.T, upper=False)
        change = torch.linalg.solve_triangular(factor.mT, half, upper=True).T
        targets.append(weight + strength * change)
    return targets
