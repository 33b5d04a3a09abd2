"""`row_max` against torch's maximum."""

import math

import pytest
import torch
from torch import Tensor

from helpers.native_cases import kernels, threads  # noqa: F401
from quantkit.kernels.cpu.row_max import row_max

#: Widths around one vector, four vectors, one chunk and several chunks.
WIDTHS = [1, 7, 8, 31, 32, 33, 100, 511, 512, 513, 1025, 4999]


def _assert_same(rows: Tensor) -> None:
    values, places = row_max(rows)
    wanted_values, wanted_places = rows.max(-1)
    torch.testing.assert_close(torch.tensor(values), wanted_values, rtol=0, atol=0, equal_nan=True)
    assert places == wanted_places.tolist()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_first_of_the_largest(kernels: str, threads: int, width: int, count: int) -> None:  # noqa: F811
    generator = torch.Generator().manual_seed(width + count)
    _assert_same(torch.randn(count, width, generator=generator))
    _assert_same(torch.randint(3, (count, width), generator=generator).float())  # many equal ones
    _assert_same(torch.full((count, width), -7.5))
    _assert_same(torch.randn(width, count + 1, generator=generator).T)  # not contiguous


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers(kernels: str, width: int, value: float) -> None:  # noqa: F811
    """One such value anywhere, two of them, and rows of nothing else."""
    for place in {0, width // 3, width - 1}:
        rows = torch.randn(3, width)
        rows[1, place] = value
        rows[2, place // 2], rows[2, place] = value, value
        _assert_same(rows)
        rows[1, place // 2] = math.inf
        _assert_same(rows)
    _assert_same(torch.full((2, width), value))
