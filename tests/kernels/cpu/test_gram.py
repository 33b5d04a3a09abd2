"""`add_product` against the exact product, on processors that have the instructions."""

import pytest
import torch
from torch import Tensor

from helpers.native_cases import threads  # noqa: F401
from quantkit.kernels.cpu import gram, library

needs_kernel = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="no AVX512_BF16 here")

#: Around the sizes of a tile (8), a vector (16) and a panel (48).
COLUMNS = [1, 7, 16, 47, 48, 49, 100, 145]
#: Around a pair and a chunk of pairs (128).
ROWS = [1, 2, 3, 255, 256, 257, 600]


def _sample(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """X and Y bfloat16 [T, K], and sums [K, K] to begin with."""
    generator = torch.Generator().manual_seed(1000 * rows + columns)
    x, y = (torch.randn(rows, columns, generator=generator).bfloat16() for _ in range(2))
    return x, y, torch.randn(columns, columns, generator=generator)


def _assert_close(found: Tensor, x: Tensor, y: Tensor, before: Tensor) -> None:
    """Within what float32 sums may lose: for every 16 terms, and for the last one, 2^-23 of the sum of all magnitudes."""
    exact = before.double() + x.double().T @ y.double()
    magnitudes = before.abs().double() + x.abs().double().T @ y.abs().double()
    assert bool(((found.double() - exact).abs() <= magnitudes * 2**-23 * (1 + len(x) / 16)).all())


@needs_kernel
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_products_are_added_in_float32(rows: int, columns: int) -> None:
    x, y, before = _sample(rows, columns)
    whole, upper = before.clone(), before.clone()
    left, right = gram.pack_rows(x), gram.pack_rows(y)
    gram.add_product(whole, left, right, [slice(0, columns)])
    _assert_close(whole, x, y, before)
    gram.add_product(upper, left, left, [slice(0, columns)], upper=True)
    above = torch.ones(columns, columns, dtype=torch.bool).triu()
    _assert_close(torch.where(above, upper, before + (x.float().T @ x.float())), x, x, before)


@needs_kernel
@pytest.mark.parametrize("upper", [True, False])
def test_every_way_to_share_the_columns_gives_the_same_bits(threads: int, upper: bool) -> None:  # noqa: F811
    x, y, before = _sample(300, 145)
    left, right = gram.pack_rows(x), gram.pack_rows(y)
    wanted = before.clone()
    torch.set_num_threads(1)
    gram.add_product(wanted, left, right, [slice(0, 145)], upper=upper)
    torch.set_num_threads(threads)
    for parts in ([slice(0, 19), slice(19, 60)], [slice(60, 61), slice(96, 145)], [slice(61, 96), slice(96, 96)]):
        found = before.clone()
        gram.add_product(found, gram.pack_rows(x), gram.pack_rows(y), parts, upper=upper)
        for part in parts:
            rows = part.stop if upper else 145
            own = torch.ones(145, 145, dtype=torch.bool).triu() if upper else torch.ones(145, 145, dtype=torch.bool)
            assert torch.equal((found * own)[:rows, part], (wanted * own)[:rows, part])
        others = [column for column in range(145) if not any(p.start <= column < p.stop for p in parts)]
        assert torch.equal(found[:, others], before[:, others])


@needs_kernel
def test_a_larger_buffer_is_used_again() -> None:
    x, y, before = _sample(257, 49)
    large = gram.pack_rows(torch.ones(600, 49, dtype=torch.bfloat16))
    packed, found = gram.pack_rows(x, large.words), before.clone()
    assert packed.words is large.words
    gram.add_product(found, packed, gram.pack_rows(y), [slice(0, 49)])
    _assert_close(found, x, y, before)


@needs_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_reach_the_sums(value: float) -> None:
    x, _, before = _sample(5, 20)
    x[4, 7] = value
    packed = gram.pack_rows(x)
    gram.add_product(before, packed, packed, [slice(0, 20)], upper=True)
    assert not before[7, 7].isfinite()
    assert before[:7, :7].isfinite().all()


def test_without_instructions_or_compiler_it_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: None)
    assert not gram.supported()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(library, "load", None)  # nothing is compiled in vain
    assert not gram.supported()
