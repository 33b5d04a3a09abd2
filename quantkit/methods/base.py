"""What a method is, the settings it works under, and what is known of a matrix's inputs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantkit.methods.asymmetric_calibration import asymmetric_targets
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.hessian import Drift
from quantkit.methods.hessian_factor import HessianFactor, factorize
from quantkit.methods.scheme import Scheme

#: Clipping factors that a method tries for the range of every group.
CLIP_RATIOS = tuple(1.0 - 0.5 * i / 16 for i in range(16))


@dataclass(frozen=True)
class Method:
    """A quantization method. `quantkit.methods.METHODS` lists them.

    Attributes:
        name: value of a recipe's `method`.
        calibrates: the method looks at calibration data.
        scales_channels: AWQ's channel scales are searched and folded into the layer before.
        compensates_errors: rounding uses the factored Hessian, as GPTQ does, and aims at asymmetric targets.
        quantize: (float32 target [N, K], statistics of its inputs, scheme, settings) -> quantized weight. The statistics are
            None where there is no calibration data.
    """

    name: str
    calibrates: bool
    scales_channels: bool
    compensates_errors: bool
    quantize: "Callable[[Tensor, InputStats | None, Scheme, SolverSettings], QuantizedWeight]"


@dataclass(frozen=True)
class SolverSettings:
    """How matrices are quantized; the fields are the recipe's.

    Attributes:
        method: what chooses the codes.
        act_order, damping, asymmetric_calibration, coordinate_descent_passes: see `Recipe`.
        dtype: the artifact's 16-bit type.
    """

    method: Method
    act_order: bool
    damping: float
    asymmetric_calibration: float
    coordinate_descent_passes: int | None
    dtype: torch.dtype

    def descent_passes(self, bits: int) -> int:
        """Passes of coordinate descent after GPTQ on a grid of `bits` bits.

        By default one pass at 2 and 3 bits, none above. On six blocks of the quality base one pass brings the KL divergence
        at 2 bits from 0.363 to 0.336, and at 4 bits from 0.0307 to 0.0312.
        """
        return self.coordinate_descent_passes if self.coordinate_descent_passes is not None else int(bits < 4)

    @property
    def needs_reference(self) -> bool:
        """Whether the original model must run next to the quantized one during calibration."""
        return self.method.compensates_errors and self.asymmetric_calibration > 0


@dataclass
class InputStats:
    """What is known of one input, shared by all matrices that read it.

    Attributes:
        hessian: float32 [K, K].
        drift: how the input differs from the original model's. None where the original model did not run, or once
            `take_targets` was called.
        settings: how the matrices are quantized.
    """

    hessian: Tensor
    drift: Drift | None
    settings: SolverSettings

    @cached_property
    def factor(self) -> HessianFactor | None:
        """Factor of the damped Hessian. None where the method needs none, or where no damping made it factorizable."""
        settings = self.settings
        if not settings.method.compensates_errors:
            return None
        return factorize(self.hessian, settings.damping, settings.act_order)

    def divided_by(self, scale: Tensor) -> "InputStats":
        """The statistics of the inputs divided by `scale` (float32 [K] > 0). Nothing is factored again."""
        outer = scale[:, None] * scale
        drift = None if self.drift is None else self.drift.divided_by(outer)
        divided = InputStats(self.hessian / outer, drift, self.settings)
        divided.factor = None if self.factor is None else self.factor.divided_by(scale)
        return divided

    def take_targets(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """The target to quantize in place of each of `weights` (float32 [N, K]).

        Frees the drift: for wide inputs it takes twice the memory of the Hessian, which is still to be factored.
        """
        drift, self.drift = self.drift, None
        if drift is None or not self.settings.method.compensates_errors:
            return list(weights)
        return asymmetric_targets(weights, drift, self.settings.asymmetric_calibration)
