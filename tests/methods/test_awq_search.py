"""AWQ's search and clipping: the errors computed from the Hessian are those of running the module."""

import pytest
import torch
from torch import Tensor

from helpers.method_samples import SCHEMES, activations, assert_sound, second_moment, weights
from quantkit.methods.awq import RATIOS, quantize_clipped, search_channel_scale
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.rtn import rtn
from quantkit.methods.scheme import Scheme

BF16 = torch.bfloat16
UNTIED = torch.arange(96)
PARTS = [(weights(24, 96, seed=1), Scheme(4, 32, True)), (weights(300, 96, seed=2), Scheme(3, 16, False))]


def _measured(x: Tensor, scale: Tensor) -> float:
    """||X dW^T||^2 over all parts, computed as the artifact does: inputs / scale, and weights * scale quantized."""
    total = 0.0
    for weight, scheme in PARTS:
        rounded = rtn(weight * scale, scheme, BF16).dequantize().double()
        outputs = (x.double() / scale.double()) @ rounded.T
        total += float((outputs - x.double() @ weight.double().T).square().sum())
    return total


def test_tries_twenty_ratios_from_none_to_nearly_all() -> None:
    assert len(set(RATIOS)) >= 20
    assert min(RATIOS) == 0
    assert 0.9 <= max(RATIOS) <= 1


def test_error_is_that_of_running_the_module() -> None:
    x = activations(96)
    found = search_channel_scale(PARTS, second_moment(x), BF16, UNTIED)
    assert 0 < found.ratio <= 1
    # Both sum the same products, one in float32 through the Hessian, the other in float64 token by token.
    assert found.error == pytest.approx(_measured(x, found.scale) / _measured(x, torch.ones(96)), rel=1e-4)
    assert found.error < 0.95


def test_no_ratio_is_better() -> None:
    x = activations(96)
    found = search_channel_scale(PARTS, second_moment(x), BF16, UNTIED)
    magnitude = x.double().square().mean(0).sqrt().float()
    plain = _measured(x, torch.ones(96))
    best = min(_measured(x, magnitude**ratio / (magnitude**ratio).mean()) for ratio in RATIOS)
    # Another normalization of the same scale only changes the rounding of stored grid scales, by 2^-9 of a step.
    assert found.error <= 1.01 * best / plain


def test_scale_follows_the_activations() -> None:
    x = activations(96)
    found = search_channel_scale(PARTS, second_moment(x), BF16, UNTIED)
    magnitude = x.square().mean(0).sqrt()
    torch.testing.assert_close(found.scale / found.scale[0], (magnitude / magnitude[0]) ** found.ratio, rtol=1e-4, atol=0)
    # The largest and the smallest scale are each other's inverse, so neither weights nor inputs leave 16 bits first.
    assert float(found.scale.max() * found.scale.min()) == pytest.approx(1, rel=1e-4)


def test_tied_channels_share_a_scale() -> None:
    # Heads of 8 channels; query heads 0-2, 3-5, ... share a KV head.
    channel = torch.arange(96)
    channel_groups = channel // 24 * 8 + channel % 8
    found = search_channel_scale(PARTS, second_moment(activations(96)), BF16, channel_groups)
    assert found.ratio > 0
    assert len(found.scale.unique()) == 32
    for shared in range(32):
        assert len(found.scale[channel_groups == shared].unique()) == 1


def test_nothing_is_scaled_where_nothing_helps() -> None:
    # Equal inputs make every ratio the same scale, and no inputs make every error zero.
    for hessian in (torch.eye(96), torch.zeros(96, 96)):
        found = search_channel_scale(PARTS, hessian, BF16, UNTIED)
        assert found.ratio == 0
        assert torch.equal(found.scale, torch.ones(96))


def test_dead_channels_keep_the_scale_finite() -> None:
    x = activations(96)
    x[:, [3, 40]] = 0
    found = search_channel_scale(PARTS, second_moment(x), BF16, UNTIED)
    assert bool((found.scale.isfinite() & (found.scale > 0)).all())
    assert found.error <= 1


def _group_losses(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    """<dw, H_gg dw> of every (row, group), float64: the objective of the clipping."""
    groups = quantized.scales.shape[1]
    width = weight.shape[1] // groups
    change = (quantized.dequantize().double() - weight.double()).view(len(weight), groups, width)
    blocks = torch.stack([hessian.double()[s : s + width, s : s + width] for s in range(0, weight.shape[1], width)])
    return torch.einsum("ngi,gij,ngj->ng", change, blocks, change)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_clipping_is_the_best_of_its_factors(scheme: Scheme) -> None:
    hessian, weight, factors = second_moment(activations(96)), weights(20, 96), (1.0, 0.9, 0.8, 0.7)
    found = quantize_clipped(weight, hessian, scheme, BF16, factors)
    assert_sound(found, 20, 96, BF16)
    losses = _group_losses(weight, found, hessian)
    alone = torch.stack(
        [_group_losses(weight, quantize_clipped(weight, hessian, scheme, BF16, (f,)), hessian) for f in factors]
    )
    # Candidates are compared in float32 sums of at most 96 * 96 products.
    assert bool((losses <= _group_losses(weight, rtn(weight, scheme, BF16), hessian) * (1 + 1e-4)).all())
    torch.testing.assert_close(losses, alone.amin(0), rtol=1e-4, atol=0)
    if scheme.bits < 8:
        assert bool((losses < alone[0]).any())


def test_clipping_without_a_choice_is_plain_rounding() -> None:
    hessian, weight, scheme = second_moment(activations(96)), weights(20, 96), Scheme(4, 32, False)
    assert torch.equal(quantize_clipped(weight, hessian, scheme, BF16, (1.0,)).codes, rtn(weight, scheme, BF16).codes)
