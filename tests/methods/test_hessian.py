"""Second moments: token-weighted means, whatever the micro-batches."""

from typing import Any

import pytest
import torch

from helpers.method_samples import activations
from quantkit.kernels.cpu import gram
from quantkit.methods.hessian import HessianAccumulator

CPU = torch.device("cpu")
# float32 sums of 512 products: the error grows like sqrt(512) * 2^-24 of the largest entry.
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}


@pytest.mark.parametrize("columns", [1, 5, 96, 100])
def test_mean_is_the_second_moment(columns: int) -> None:
    x = activations(columns)
    sums = HessianAccumulator(columns, CPU)
    sums.add(x.view(4, 128, columns))
    wide = x.double()
    torch.testing.assert_close(sums.mean().double(), wide.T @ wide / 512, **TOLERANCE)
    assert torch.equal(sums.mean(), sums.mean().T)
    assert sums.tokens == 512


def test_micro_batches_weigh_by_their_tokens() -> None:
    x = activations(24, tokens=500)
    # The smallest batch has the largest values: a mean of means would give it 18 times its weight.
    x[:7] *= 30
    whole, parts = HessianAccumulator(24, CPU), HessianAccumulator(24, CPU)
    whole.add(x)
    for batch in x.split([7, 1, 236, 256]):
        parts.add(batch)
    expected = x.double().T @ x.double() / 500
    torch.testing.assert_close(parts.mean().double(), expected, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(parts.mean(), whole.mean(), rtol=1e-5, atol=1e-2)


def test_inputs_of_16_bit_are_summed_in_float32() -> None:
    x = activations(16).bfloat16()
    sums = HessianAccumulator(16, CPU)
    sums.add(x)
    wide = x.double()
    torch.testing.assert_close(sums.mean().double(), wide.T @ wide / 512, **TOLERANCE)


def test_drift_is_over_the_paired_rows_only() -> None:
    x, reference = activations(24), activations(24, seed=1)
    sums = HessianAccumulator(24, CPU)
    sums.add(x[:100], reference[:100])
    sums.add(x[100:130], reference[100:130])
    for batch in x[130:].split(200):
        sums.add(batch)
    drift = sums.drift()
    assert drift is not None
    wide, apart = x[:130].double(), (reference - x)[:130].double()
    torch.testing.assert_close(drift.cross.double(), wide.T @ apart / 130, **TOLERANCE)
    torch.testing.assert_close(drift.hessian.double(), wide.T @ wide / 130, **TOLERANCE)
    torch.testing.assert_close(sums.mean().double(), x.double().T @ x.double() / 512, **TOLERANCE)


def test_dividing_the_drift_is_the_drift_of_divided_inputs() -> None:
    x, reference = activations(24), activations(24, seed=1)
    scale = torch.linspace(0.5, 2, 24)
    sums, divided = HessianAccumulator(24, CPU), HessianAccumulator(24, CPU)
    sums.add(x, reference)
    divided.add(x / scale, reference / scale)
    drift, wanted = sums.drift(), divided.drift()
    assert drift is not None
    assert wanted is not None
    found = drift.divided_by(scale[:, None] * scale)
    torch.testing.assert_close(found.cross, wanted.cross, **TOLERANCE)
    torch.testing.assert_close(found.hessian, wanted.hessian, **TOLERANCE)


def test_equal_streams_do_not_drift() -> None:
    x = activations(24)
    alone, paired = HessianAccumulator(24, CPU), HessianAccumulator(24, CPU)
    alone.add(x)
    paired.add(x, x)
    assert alone.drift() is None
    drift = paired.drift()
    assert drift is not None
    assert not drift.cross.any()


@pytest.mark.skipif(not gram.supported(), reason="no native products of bfloat16 here")
def test_products_in_bfloat16_are_the_same_sums() -> None:
    """Of bfloat16 inputs; only the difference from the reference is rounded once more."""
    x = activations(100).bfloat16()
    reference = (x + 0.1 * activations(100, seed=1)).bfloat16()
    native, plain = HessianAccumulator(100, CPU, dtype=torch.bfloat16), HessianAccumulator(100, CPU)
    for sums in (native, plain):
        sums.add(x[:101], reference[:101])
        sums.add(x[101:130].view(1, 29, 100), reference[101:130].view(1, 29, 100))
        for batch in x[130:].split(200):
            sums.add(batch)
    torch.testing.assert_close(native.mean(), plain.mean(), **TOLERANCE)
    found, expected = native.drift(), plain.drift()
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.hessian, expected.hessian, **TOLERANCE)
    rounded = x[:130].float().abs().T @ (reference - x)[:130].float().abs() / 130 * 2**-8
    assert bool(((found.cross - expected.cross).abs() <= rounded).all())
