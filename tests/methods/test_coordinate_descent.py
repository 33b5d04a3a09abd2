"""Coordinate descent never makes the loss worse, and stops where no single step helps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.method_samples import SCHEMES, activations, assert_sound, loss, second_moment, weights
from quantkit.methods.coordinate_descent import coordinate_descent
from quantkit.methods.gptq import gptq
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.hessian_factor import factorize
from quantkit.methods.rtn import rtn
from quantkit.methods.scheme import Scheme

BF16 = torch.bfloat16


def _damped(columns: int, seed: int = 0) -> Tensor:
    factor = factorize(second_moment(activations(columns, seed=seed)), 0.01, act_order=False)
    assert factor is not None
    return factor.hessian


def _row_losses(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    change = quantized.dequantize().double() - weight.double()
    return ((change @ hessian.double()) * change).sum(-1)


@settings(max_examples=30, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 1000), passes=st.integers(1, 4), rounded=st.booleans())
def test_never_worse_than_its_start(scheme: Scheme, seed: int, passes: int, rounded: bool) -> None:
    columns = 96
    hessian, weight = _damped(columns, seed), weights(6, columns, seed)
    factor = factorize(hessian, 0.01, act_order=True)
    assert factor is not None
    start = rtn(weight, scheme, BF16) if rounded else gptq(weight, factor, scheme, BF16, (1.0, 0.8))
    better = coordinate_descent(weight, start, hessian, BF16, passes)
    assert_sound(better, 6, columns, BF16)
    before, after = _row_losses(weight, start, hessian), _row_losses(weight, better, hessian)
    # Steps are compared in float32, where the objective of a row is a sum of 96 products: 1e-6 of the signal's own size.
    signal = ((weight.double() @ hessian.double()) * weight.double()).sum(-1)
    assert bool((after <= before + 1e-6 * signal).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_lowers_the_objective_of_plain_rounding(scheme: Scheme) -> None:
    hessian, weight = _damped(96), weights(16, 96)
    start = rtn(weight, scheme, BF16)
    assert loss(weight, coordinate_descent(weight, start, hessian, BF16, 2), hessian) < 0.8 * loss(weight, start, hessian)


@pytest.mark.parametrize("scheme", [Scheme(4, 16, True), Scheme(3, 32, False), Scheme(4, -1, False)], ids=str)
def test_stops_only_where_no_code_can_move(scheme: Scheme) -> None:
    # H @ E is updated at every step and never recomputed within a pass. If it were stale anywhere, inside a group or across
    # groups, the codes would miss the minimum that is computed from scratch here.
    hessian, weight = _damped(96), weights(8, 96)
    found = coordinate_descent(weight, rtn(weight, scheme, BF16), hessian, BF16, passes=60)
    again = coordinate_descent(weight, found, hessian, BF16, passes=1)
    assert torch.equal(found.codes, again.codes)
    assert torch.equal(found.scales, again.scales)
    pull = (weight.double() - found.dequantize().double()) @ hessian.double()
    scale = found.scales.double().repeat_interleave(scheme.group_columns(96), 1)
    for step in (-1, 1):
        allowed = (found.codes + float(step) >= 0) & (found.codes + float(step) <= scheme.levels)
        gain = 2 * pull * step * scale - (step * scale).square() * hessian.diagonal().double()
        # A tie in float32 may be a gain in float64: 1e-4 of what the step itself costs.
        most = 1e-4 * scale.square() * hessian.diagonal().double()
        assert bool((gain <= most)[allowed].all())


def test_no_sweep_changes_nothing() -> None:
    hessian, weight = _damped(96), weights(8, 96)
    start = rtn(weight, Scheme(4, 16, False), BF16)
    same = coordinate_descent(weight, start, hessian, BF16, passes=0)
    assert torch.equal(same.codes, start.codes)
    assert torch.equal(same.dequantize(), start.dequantize())


@pytest.mark.parametrize(("scale", "zero"), [(1.0, 0), (1.25, 0), (0.8, 0), (1.0, 1), (1.0, -1)])
def test_finds_the_grid_again(scale: float, zero: int) -> None:
    # The weight lies on a grid whose scales or zero points are then changed. This Hessian has no entries between groups, so
    # the codes are still the best ones, and the first refit of every group restores the grid bit for bit.
    scheme, block = Scheme(4, 16, False), _damped(16)
    exact = rtn(weights(8, 96), scheme, BF16)
    zeros = (exact.zeros + float(zero)).clamp(0, 15).to(torch.uint8)
    start = QuantizedWeight(exact.codes, exact.scales * scale, zeros, scheme)
    found = coordinate_descent(exact.dequantize(), start, torch.block_diag(*[block] * 6), BF16, passes=1)
    assert torch.equal(found.dequantize(), exact.dequantize())
