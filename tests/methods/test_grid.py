"""Grids: scales can be stored, ranges are covered, and the search is never worse than no search."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.method_samples import SCHEMES, assert_storable, weights
from quantkit.methods.grid import QuantizedWeight, minmax_qparams, round_to_grid, search_qparams, storable_scales
from quantkit.methods.scheme import Scheme

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LOWS_AND_HIGHS = [(-1.0, 0.9), (-0.3, 2.0), (-2.0, 0.0), (0.0, 1.5), (-1e-3, 1e-3), (-0.7, 0.7)]


@given(size=st.floats(2.0**-100, 2.0**100, width=32), negative=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_every_scale_becomes_one_that_can_be_stored(size: float, negative: bool, dtype: torch.dtype) -> None:
    stored = storable_scales(torch.tensor([-size if negative else size]), dtype)
    assert_storable(stored, dtype)
    assert bool((stored < 0).all()) == negative
    assert torch.equal(storable_scales(stored, dtype), stored)


@given(size=st.floats(2.0**-14, 60000.0, width=32), dtype=st.sampled_from(DTYPES))
def test_storing_a_scale_rounds_it_once(size: float, dtype: torch.dtype) -> None:
    # Inside the normal range of float16 only the mantissa is rounded: to 10 bits for float16, to 7 for other dtypes.
    limit = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    stored = float(storable_scales(torch.tensor([size]), dtype))
    assert abs(stored / size - 1) <= limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_span_covers_its_range(scheme: Scheme, dtype: torch.dtype) -> None:
    low, high = torch.tensor(LOWS_AND_HIGHS).T
    scales, zeros = minmax_qparams(low, high, scheme, dtype)
    assert_storable(scales, dtype)
    points = low + torch.linspace(0, 1, 101)[:, None] * (high - low)
    values = (round_to_grid(points, scales, zeros, scheme.levels) - zeros) * scales
    # Half a step, plus the error at the ends of the grid if the stored scale is rounded down by up to 2^-8 of itself.
    missed = ((values - points) / scales).abs().amax(0)
    assert bool((missed <= 0.5 + scheme.levels * 2.0**-8).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_scale_puts_the_longer_half_under_the_longer_end(bits: int) -> None:
    scheme, half = Scheme(bits, -1, True), 1 << (bits - 1)
    low, high = torch.tensor([-1.0, -0.25]), torch.tensor([0.25, 1.0])
    scales, zeros = minmax_qparams(low, high, scheme, torch.bfloat16)
    assert scales[0] > 0 > scales[1]
    assert torch.equal(scales[0], -scales[1])
    # Code 0 is the long end of the grid: it holds exactly the far end, a power of two.
    assert torch.equal(-zeros * scales, torch.tensor([-1.0, 1.0]))
    assert float(scales[0]) == 1 / half


def test_negative_scales_dequantize() -> None:
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    quantized = QuantizedWeight(codes, torch.tensor([[-0.5]]), torch.tensor([[2]], dtype=torch.uint8), Scheme(2, -1, True))
    assert quantized.dequantize().tolist() == [[1.0, 0.5, 0.0, -0.5]]


def _weighted_error(weight: Tensor, scheme: Scheme, importance: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The objective of `search_qparams`, float64 [N, G]."""
    grouped = weight.view(len(weight), scales.shape[1], -1)
    codes = round_to_grid(grouped, scales[..., None], zeros[..., None], scheme.levels)
    change = (codes.double() - zeros[..., None]) * scales[..., None].double() - grouped.double()
    return (change.square() * importance.double().view(1, scales.shape[1], -1)).sum(-1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_search_finds_the_best_factor_of_every_group(scheme: Scheme) -> None:
    # 130 rows: more than two of the slices that the search works in.
    weight, importance = weights(130, 96), torch.rand(96, generator=torch.Generator().manual_seed(1)) ** 4
    factors = (1.0, 0.9, 0.8, 0.7, 0.6)
    scales, zeros = search_qparams(weight, scheme, importance, torch.bfloat16, factors)
    assert_storable(scales, torch.bfloat16)
    found = _weighted_error(weight, scheme, importance, scales, zeros)
    alone = [
        _weighted_error(weight, scheme, importance, *search_qparams(weight, scheme, importance, torch.bfloat16, (factor,)))
        for factor in factors
    ]
    # The search compares float32 sums of at most 96 terms: of two candidates closer than 1e-5 it may take either.
    assert bool((found <= alone[0] * (1 + 1e-5)).all())
    torch.testing.assert_close(found, torch.stack(alone).amin(0), rtol=1e-5, atol=0)
    if scheme.bits < 8:
        assert bool((found < alone[0]).any())


def test_search_keeps_zero_points_in_range() -> None:
    weight = torch.cat([weights(4, 32) + 10, weights(4, 32) - 10, torch.zeros(1, 32)])
    scheme = Scheme(4, 16, False)
    scales, zeros = search_qparams(weight, scheme, torch.ones(32), torch.float16, (1.0, 0.8))
    assert bool(((zeros >= 0) & (zeros <= 15) & (zeros == zeros.round())).all())
    assert_storable(scales, torch.float16)


def test_group_size_must_divide() -> None:
    with pytest.raises(AssertionError, match="does not divide"):
        Scheme(4, 64, True).groups(96)
