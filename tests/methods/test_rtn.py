"""Round to nearest, compared with a simple loop."""

import pytest
import torch
from torch import Tensor

from helpers.method_samples import SCHEMES, assert_sound, weights
from quantkit.methods.rtn import rtn
from quantkit.methods.scheme import Scheme


def _stored(scale: float) -> float:
    return float(torch.tensor(scale, dtype=torch.float32).bfloat16())


def _grid(values: list[float], scheme: Scheme) -> tuple[float, int]:
    """Scale and zero point of one group, min..max with 0 inside."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    if not scheme.symmetric:
        scale = _stored((high - low) / scheme.levels)
        return scale, min(max(round(-low / scale), 0), scheme.levels)
    half = 2 ** (scheme.bits - 1)
    if high > -low:
        return -_stored(max(high / half, -low / (half - 1))), half
    return _stored(max(-low / half, high / (half - 1))), half


def _naive(weight: Tensor, scheme: Scheme) -> Tensor:
    """Dequantized values, float64, one number at a time."""
    rows, columns = weight.shape
    width = scheme.group_columns(columns)
    result = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for start in range(0, columns, width):
            values = weight[row, start : start + width].tolist()
            scale, zero = _grid(values, scheme)
            for k, value in enumerate(values, start):
                code = min(max(round(value / scale) + zero, 0), scheme.levels)
                result[row, k] = (code - zero) * scale
    return result


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_a_naive_loop(scheme: Scheme) -> None:
    weight = weights(5, 96, seed=3)
    quantized = rtn(weight, scheme, torch.bfloat16)
    assert_sound(quantized, 5, 96, torch.bfloat16)
    # The loop divides in float64. A quotient within 2^-24 * 255 of a tie could round the other way; none of these is.
    # Codes and zero points are small integers and scales hold 8 bits, so equal codes give equal values to the bit.
    assert torch.equal(quantized.dequantize().double(), _naive(weight, scheme))


def test_a_group_of_zeros_stays_zero() -> None:
    for symmetric in (True, False):
        assert not rtn(torch.zeros(2, 32), Scheme(4, 16, symmetric), torch.bfloat16).dequantize().any()
