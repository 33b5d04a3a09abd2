"""Quantize one matrix with the method of the settings."""

from torch import Tensor

from quantkit.methods.base import InputStats, SolverSettings
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.scheme import Scheme


def solve(target: Tensor, stats: InputStats | None, scheme: Scheme, settings: SolverSettings) -> QuantizedWeight:
    """Quantize `target` (float32 [N, K], from `InputStats.take_targets`).

    Args:
        target: the weight to approximate.
        stats: statistics of the inputs; None without calibration data, where every built-in method rounds to nearest.
        scheme: bits, group size and symmetry.
        settings: method and its settings.

    A method that needs the factored Hessian also rounds to nearest where it could not be factored. The caller sees that
    `stats.factor` is None and reports it.
    """
    return settings.method.quantize(target, stats, scheme, settings)
