"""The Hadamard transform: the reference against its definition, and all kernels against the reference."""

import pytest
import torch
from torch import Tensor

from helpers.native_cases import kernels, threads  # noqa: F401
from helpers.weights import DEVICE
from quantkit.kernels import reference
from quantkit.kernels.cpu import hadamard as cpu_hadamard
from quantkit.kernels.gpu.matmul.hadamard import hadamard

#: Rows, columns, block: narrower and wider than a vector, blocks that end within a vector, a single block.
SHAPES = [(1, 576, 64), (3, 1536, 512), (5, 12, 4), (2, 6, 2), (2, 3, 1), (7, 40, 8), (2, 48, 16), (1, 4096, 4096)]


def _rows(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed, with one channel 100 times larger."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x[:, columns // 3] *= 100
    return x.to(dtype)


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_the_oracle_multiplies_by_sylvesters_matrix(block: int) -> None:
    x = _rows(3, 2 * block, torch.float64)
    wanted = x @ torch.block_diag(_sylvester(block), _sylvester(block))
    torch.testing.assert_close(reference.hadamard(x, block), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.hadamard(reference.hadamard(x, block), block), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_on_a_cpu(kernels: str, rows: int, columns: int, block: int, dtype: torch.dtype) -> None:  # noqa: F811
    """Equal to the bit: the same sums in the same order. The input is unchanged."""
    x = _rows(rows, columns, dtype)
    before = x.clone()
    found = cpu_hadamard.hadamard(x.view(rows, 1, columns), block)
    assert torch.equal(found, reference.hadamard(x, block).view(rows, 1, columns))
    assert found.dtype == dtype
    assert torch.equal(x, before)


def test_rows_that_are_not_contiguous(kernels: str) -> None:  # noqa: F811
    x = _rows(64, 6).T
    assert torch.equal(cpu_hadamard.hadamard(x, 64), reference.hadamard(x.contiguous(), 64))
    assert cpu_hadamard.hadamard(x[:0], 64).shape == (0, 64)


def test_threads_change_nothing(threads: int) -> None:  # noqa: F811
    assert torch.equal(cpu_hadamard.hadamard(_rows(5, 256), 128), reference.hadamard(_rows(5, 256), 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_triton(rows: int, columns: int, block: int, dtype: torch.dtype) -> None:
    """Sums and differences cannot be fused, so float32 agrees to the bit; the interpreter truncates to bfloat16."""
    x = _rows(rows, columns, dtype).to(DEVICE)
    found, wanted = hadamard(x, block), reference.hadamard(x, block)
    assert found.dtype == dtype
    last_place = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    assert bool(((found.float() - wanted.float()).abs() <= last_place * wanted.float().abs()).all())


def test_triton_on_rows_of_a_wider_tensor() -> None:
    wide = _rows(4, 96).to(DEVICE)
    assert torch.equal(hadamard(wide[:, 32:], 64), reference.hadamard(wide[:, 32:], 64))
    assert torch.equal(hadamard(wide.T, 4), reference.hadamard(wide.T, 4))
    assert hadamard(wide[:0], 32).shape == (0, 96)
