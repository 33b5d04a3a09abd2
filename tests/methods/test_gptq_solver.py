"""GPTQ, compared with a slow and simple version of the paper's algorithm."""

from functools import cache

import pytest
import torch
from torch import Tensor

from helpers.method_samples import SCHEMES, activations, assert_sound, loss, second_moment, weights
from quantkit.methods.gptq import gptq
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.hessian_factor import HessianFactor, factorize
from quantkit.methods.rtn import quantize_on_grid, rtn
from quantkit.methods.scheme import Scheme

BF16 = torch.bfloat16
CLIP_RATIOS = (1.0, 0.85, 0.7)

#: How far, in steps of the grid, a value may lie from the reference's. Damping of 1% bounds the condition number near 1e3,
#: and float32 holds 6e-8: the factor is good to about 1e-4, and so is a value a few steps from zero.
NEAR = 2e-3


@cache
def _problem(columns: int, act_order: bool) -> tuple[Tensor, HessianFactor]:
    """A Hessian and its factor, shared by the grids that are tried on it."""
    hessian = second_moment(activations(columns))
    factor = factorize(hessian, 0.01, act_order)
    assert factor is not None
    return hessian, factor


@cache
def _first_rows(columns: int, act_order: bool) -> list[Tensor]:
    """First row of the inverse of the remaining Hessian at every step, each inverted from scratch in float64."""
    _, factor = _problem(columns, act_order)
    return [torch.linalg.inv(factor.hessian.double()[left][:, left])[0] for left in (factor.order[j:] for j in range(columns))]


def _wanted_codes(weight: Tensor, quantized: QuantizedWeight, factor: HessianFactor, first_rows: list[Tensor]) -> Tensor:
    """The unrounded code that the paper's algorithm would round, float64 [N, K], given every code chosen before it.

    Following the chosen codes instead of its own makes each code a test of its own: otherwise one code rounded the other
    way at a tie would change all that come after it.
    """
    left = weight.double()[:, factor.order]
    wanted = torch.empty_like(left)
    width = quantized.scheme.group_columns(weight.shape[1])
    chosen = quantized.dequantize().double()
    for j, row in enumerate(first_rows):
        column = int(factor.order[j])
        scale, zero = quantized.scales[:, column // width].double(), quantized.zeros[:, column // width].double()
        wanted[:, column] = left[:, j] / scale + zero
        error = (left[:, j] - chosen[:, column]) / row[0]
        left[:, j:] -= error[:, None] * row
    return wanted


def _assert_follows_the_paper(
    weight: Tensor, quantized: QuantizedWeight, factor: HessianFactor, first_rows: list[Tensor]
) -> None:
    levels = quantized.scheme.levels
    wanted = _wanted_codes(weight, quantized, factor, first_rows)
    # Values beyond the ends of the grid must get the code of that end.
    missed = (wanted.clamp(0, levels) - quantized.codes).abs()
    assert float(missed.max()) <= 0.5 + NEAR
    # Values lie evenly between grid points, so at most a share of 2 * NEAR is so close to a tie that either code is right.
    other = wanted.round().clamp(0, levels) != quantized.codes
    assert float(other.double().mean()) <= 2 * NEAR


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(5, 96), (9, 160)])
def test_codes_are_the_papers(rows: int, columns: int, scheme: Scheme, act_order: bool) -> None:
    _, factor = _problem(columns, act_order)
    weight = weights(rows, columns)
    quantized = gptq(weight, factor, scheme, BF16, CLIP_RATIOS)
    assert_sound(quantized, rows, columns, BF16)
    _assert_follows_the_paper(weight, quantized, factor, _first_rows(columns, act_order))


@pytest.mark.parametrize("columns", [128, 288])
def test_error_crosses_the_runs(columns: int) -> None:
    # 288 columns are two full runs and a part of a third: the error of run 1 must reach run 3.
    _, factor = _problem(columns, True)
    weight, scheme = weights(8, columns), Scheme(3, 32, False)
    quantized = gptq(weight, factor, scheme, BF16, CLIP_RATIOS)
    _assert_follows_the_paper(weight, quantized, factor, _first_rows(columns, True))


def test_rows_do_not_touch_each_other() -> None:
    # Stacked matrices must get the same codes as each alone, except at ties: products of other shapes may round differently.
    _, factor = _problem(160, True)
    parts = [weights(7, 160, seed=1), weights(30, 160, seed=2)]
    stacked = gptq(torch.cat(parts), factor, Scheme(4, 32, True), BF16, CLIP_RATIOS)
    for part, (start, stop) in zip(parts, [(0, 7), (7, 37)], strict=True):
        quantized = stacked.rows(start, stop)
        assert torch.equal(quantized.scales, gptq(part, factor, Scheme(4, 32, True), BF16, CLIP_RATIOS).scales)
        _assert_follows_the_paper(part, quantized, factor, _first_rows(160, True))


def test_weight_is_left_alone() -> None:
    _, factor = _problem(96, True)
    weight = weights(5, 96)
    gptq(weight, factor, Scheme(4, 32, True), BF16, CLIP_RATIOS)
    assert torch.equal(weight, weights(5, 96))


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_beats_rounding(scheme: Scheme, act_order: bool) -> None:
    hessian, factor = _problem(160, act_order)
    weight = weights(64, 160)
    solved = gptq(weight, factor, scheme, BF16, CLIP_RATIOS)
    # Compared with plain rounding, and with rounding on the same grids; the latter shows the effect of compensation alone.
    on_same_grids = quantize_on_grid(weight, scheme, solved.scales, solved.zeros.float())
    for rounded in (rtn(weight, scheme, BF16), on_same_grids):
        assert loss(weight, solved, hessian) < 0.8 * loss(weight, rounded, hessian)


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_dead_inputs_cost_nothing_and_disturb_nobody(act_order: bool) -> None:
    x, dead = activations(96), torch.tensor([0, 17, 18, 95])
    x[:, dead] = 0
    factor = factorize(second_moment(x), 0.01, act_order)
    assert factor is not None
    assert bool(factor.upper.isfinite().all())
    weight, scheme = weights(8, 96), Scheme(4, 16, False)
    quantized = gptq(weight, factor, scheme, BF16, CLIP_RATIOS)
    rounded = quantize_on_grid(weight, scheme, quantized.scales, quantized.zeros.float())
    # No error reaches a dead column, so it is rounded to nearest; none leaves it, so its weights do not affect the others.
    assert torch.equal(quantized.codes[:, dead], rounded.codes[:, dead])
    for step in torch.isin(factor.order, dead).nonzero().flatten().tolist():
        assert not factor.upper[step, step + 1 :].any()


def test_without_dead_inputs_the_hessian_is_only_damped() -> None:
    hessian, factor = _problem(96, True)
    damping = 0.01 * hessian.diagonal().mean() * torch.eye(96)
    torch.testing.assert_close(factor.hessian, hessian + damping)
    assert factor.damping == 0.01


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_factor_is_that_of_the_ordered_inverse(act_order: bool) -> None:
    hessian, factor = _problem(96, act_order)
    assert torch.equal(factor.upper, factor.upper.triu())
    rebuilt = factor.upper.double().T @ factor.upper.double()
    ordered = factor.hessian.double()[factor.order][:, factor.order]
    # Relative to 1 on the diagonal: the condition number, near 1e3, times float32's 6e-8, with room for K = 96 sums.
    torch.testing.assert_close(rebuilt @ ordered, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-3)
    met = hessian.diagonal()[factor.order]
    if act_order:
        assert bool((met[1:] <= met[:-1]).all())
    else:
        assert torch.equal(factor.order, torch.arange(96))


def _shifted(lowest: float) -> Tensor:
    """A symmetric matrix with a mean diagonal of 1 whose smallest eigenvalue is `lowest`."""
    columns = 32
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    values = torch.full((columns,), (columns - lowest) / (columns - 1), dtype=torch.float64)
    values[0] = lowest
    return ((basis * values) @ basis.T).float()


@pytest.mark.parametrize(("lowest", "needed"), [(0.5, 0.001), (-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
def test_damping_is_raised_until_the_hessian_factors(lowest: float, needed: float) -> None:
    factor = factorize(_shifted(lowest), 0.001, act_order=False)
    assert factor is not None
    assert factor.damping == pytest.approx(needed)
    added = factor.hessian - _shifted(lowest)
    # The mean diagonal is 1 to float32's rounding of its 32 entries.
    torch.testing.assert_close(added, needed * torch.eye(32), rtol=1e-5, atol=1e-6)


def test_a_hopeless_hessian_has_no_factor() -> None:
    assert factorize(_shifted(-5.0), 0.01, act_order=True) is None


@pytest.mark.parametrize("act_order", [True, False])
def test_a_divided_factor_is_that_of_the_divided_inputs(act_order: bool) -> None:
    _, factor = _problem(48, act_order)
    scale = torch.logspace(-1, 1, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    divided = factor.divided_by(scale)
    inputs = torch.diag(1 / scale.double())
    expected = torch.linalg.inv(inputs @ factor.hessian.double() @ inputs)[factor.order][:, factor.order]
    upper = divided.upper.double()
    assert torch.equal(upper, upper.triu())
    # Float32, and a condition number of some 1e3.
    torch.testing.assert_close(upper.T @ upper, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    torch.testing.assert_close(divided.hessian.double(), inputs @ factor.hessian.double() @ inputs, rtol=1e-5, atol=0)
