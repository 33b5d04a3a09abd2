"""From a weight matrix and its inputs' moments to codes: the one place that knows what each method is made of."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantkit.methods.awq import quantize_clipped
from quantkit.methods.gptq import HessianFactor, coordinate_descent, factor_in_place, factorize, gptq
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.hessian import Drift
from quantkit.methods.rtn import rtn
from quantkit.methods.scheme import Scheme

#: Clipping factors tried for every group.
CLIP_RATIOS = tuple(1.0 - 0.5 * i / 16 for i in range(16))


#: Ridge of the drift regression, as a fraction of the mean diagonal of H. The regression sees a share of the rows and
#: overfits without it, the more the fewer they are: on the quality base (4-bit symmetric, 64 rows of 512) an eighth of the
#: rows gives a KL divergence of 0.092 with a ridge of 0.5 and 0.086 with 1.0, as a quarter does with 0.5; 0.01 gives 0.17.
RIDGE = 1.0


@dataclass(frozen=True)
class SolverSettings:
    """How to solve; the fields are the recipe's.

    Attributes:
        method: rtn, awq, gptq or awq+gptq.
        act_order, damping, asymmetric_calibration, coordinate_descent_passes: see `Recipe`.
        dtype: the artifact's 16-bit type.
    """

    method: str
    act_order: bool
    damping: float
    asymmetric_calibration: float
    coordinate_descent_passes: int | None
    dtype: torch.dtype

    @property
    def scales_channels(self) -> bool:
        """Whether AWQ's channel scales are searched."""
        return self.method.startswith("awq")

    @property
    def compensates(self) -> bool:
        """Whether GPTQ solves for the codes."""
        return self.method.endswith("gptq")

    def descent_passes(self, bits: int) -> int:
        """Passes of coordinate descent after GPTQ over a grid of so many bits.

        On six blocks of the quality base one brings the KL divergence at 2 bits from 0.363 to 0.336, and at 4 bits from 0.0307
        to 0.0312.
        """
        return self.coordinate_descent_passes if self.coordinate_descent_passes is not None else int(bits < 4)

    @property
    def needs_reference(self) -> bool:
        """Whether the original model must walk beside the quantized one."""
        return self.compensates and self.asymmetric_calibration > 0


@dataclass
class InputStats:
    """What is known of a group's inputs, for all matrices that read them.

    Attributes:
        hessian: float32 [K, K].
        drift: None when no original walks beside, or its targets were taken.
        settings: how to solve.
    """

    hessian: Tensor
    drift: Drift | None
    settings: SolverSettings

    @cached_property
    def factor(self) -> HessianFactor | None:
        """Factor of the damped Hessian; None when the method needs none or no damping helped."""
        settings = self.settings
        return factorize(self.hessian, settings.damping, settings.act_order) if settings.compensates else None

    def divided_by(self, scale: Tensor) -> "InputStats":
        """The moments of the inputs divided by `scale`, float32 [K] > 0; nothing is factored again."""
        outer = scale[:, None] * scale
        divided = InputStats(self.hessian / outer, None if self.drift is None else self.drift.divided_by(outer), self.settings)
        divided.factor = None if self.factor is None else self.factor.divided_by(scale)
        return divided

    def take_targets(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """What to solve for in the place of each of `weights` (float32 [N, K]).

        The drift is given up: at a wide input it is twice as large as the Hessian, and the factor is still to come.
        """
        drift, self.drift = self.drift, None
        if drift is None or not self.settings.compensates:
            return list(weights)
        return asymmetric_targets(weights, drift, self.settings.asymmetric_calibration)


def asymmetric_targets(weights: Iterable[Tensor], drift: Drift, strength: float) -> list[Tensor]:
    """The weights that give the original model's outputs from the quantized model's inputs, float32 [N, K] each.

    Ridge regression: W* = W + strength * W D^T (H + ridge)^-1 with D = X^T (X_ref - X) / T and H over the same tokens.
    With strength 1 this is the asymmetric calibration of Li et al., "GPTAQ" (arXiv 2504.02692), solved before rounding
    instead of during it. Returns `weights` themselves where the regression cannot be solved.
    """
    factor = drift.hessian.clone().mT
    factor.diagonal().add_(RIDGE * drift.hessian.diagonal().mean())
    if strength == 0 or not factor_in_place(factor):
        return list(weights)
    found = []
    for weight in weights:
        # Two triangular solves, because `cholesky_solve` copies the factor.
        half = torch.linalg.solve_triangular(factor, drift.cross @ weight.T, upper=False)
        change = torch.linalg.solve_triangular(factor.mT, half, upper=True).T
        found.append(weight + strength * change)
    return found


def solve(target: Tensor, stats: InputStats | None, scheme: Scheme, settings: SolverSettings) -> QuantizedWeight:
    """Quantize `target` (float32 [N, K], from `take_targets`); `stats` is None for data-free rounding only.

    Where the Hessian could not be factored the result is plain rounding; the caller sees `moments.inverse is None` and
    reports it.
    """
    if stats is None or settings.method == "rtn":
        return rtn(target, scheme, settings.dtype)
    if not settings.compensates:
        return quantize_clipped(target, stats.hessian, scheme, settings.dtype, CLIP_RATIOS)
    factor = stats.factor
    if factor is None:
        return rtn(target, scheme, settings.dtype)
    found = gptq(target, factor, scheme, settings.dtype, CLIP_RATIOS)
    passes = settings.descent_passes(scheme.bits)
    return coordinate_descent(target, found, factor.hessian, settings.dtype, passes) if passes else found
