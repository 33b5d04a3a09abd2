"""W4A8 products on a CPU against the reference, and properties of the reference itself."""

import pytest
import torch
from torch import Tensor

from helpers.native_cases import kernels, threads  # noqa: F401
from quantkit.kernels import reference
from quantkit.kernels.cpu import library
from quantkit.kernels.cpu import matmul as cpu_matmul
from quantkit.kernels.cpu.w4a8 import w4a8_matmul

#: Numbers of rows on both sides of each switch between kernels.
ROWS = [1, 2, 3, 4, 5, 9]

#: N, K, group: incomplete tiles, groups, words and blocks; an odd number of groups.
SHAPES = [(70, 576, 64), (33, 96, 32), (5, 100, 100), (40, 520, -1), (40, 60, 20), (96, 1536, 512), (1, 16, 16)]

Parts = tuple[Tensor, Tensor, Tensor]


def _sample(rows: int, columns: int, group: int, bits: int) -> Parts:
    """Codes uint8 [N, K], scales float32 and zeros uint8 [N, G], including the smallest and the largest zero point."""
    generator = torch.Generator().manual_seed(rows + columns + bits)
    groups = 1 if group == -1 else columns // group
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8, generator=generator)
    zeros[0], zeros[-1] = 0, (1 << bits) - 1
    return codes, torch.rand(rows, groups, generator=generator) * 0.03 + 0.01, zeros


def _rows(rows: int, columns: int) -> Tensor:
    """Normally distributed, with one channel 10 times larger, and a row of zeros."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x[:, columns // 3] *= 10
    x[2:3] = 0
    return x


def _assert_close(found: Tensor, x: Tensor, parts: Parts, group: int, bits: int, bias: Tensor | None = None) -> None:
    """Sums of integers are exact or, in float32, off by the rounding of K terms, typically 2^-24 sqrt(K) of their magnitude.
    The same holds for sums over groups. The result is rounded to x's type."""
    wanted = reference.w4a8_matmul(x, *parts, group, bits, bias)
    inputs, scales = reference.quantize_rows(x, bits)
    size = reference.dequant_matmul(inputs.abs() * scales[:, None], parts[0], parts[1], torch.zeros_like(parts[2]), group)
    size += reference.dequant_matmul(inputs.abs() * scales[:, None], torch.zeros_like(parts[0]), -parts[1], parts[2], group)
    allowed = 2.0**-19 * size + torch.finfo(x.dtype).eps * wanted.abs() + 1e-30
    assert found.dtype == x.dtype
    assert found.shape == wanted.shape
    worst = ((found.float() - wanted).abs() / allowed).max()
    assert bool(worst <= 1), f"off by {worst:.2f} times what is allowed"


@pytest.mark.parametrize("activation_bits", [4, 8])
def test_rounded_rows(activation_bits: int) -> None:
    most = 2 ** (activation_bits - 1) - 1
    x = _rows(5, 300)
    codes, scales = reference.quantize_rows(x, activation_bits)
    assert codes.dtype == torch.int8
    assert codes.abs().amax(-1).tolist() == [most, most, 0, most, most]
    # Half a step, plus a little for the rounding of the quotient.
    assert bool(((codes * scales[:, None] - x).abs() <= scales[:, None] * (0.5 + 1e-5)).all())
    ties = torch.tensor([[float(most), 0.5, 1.5, 2.5, -0.5, -2.5]])
    assert reference.quantize_rows(ties, activation_bits)[0].tolist() == [[most, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("activation_bits", [4, 8])
def test_the_oracle_multiplies_what_was_rounded(activation_bits: int) -> None:
    parts, x = _sample(20, 128, 32, 4), _rows(4, 128)
    codes, scales = reference.quantize_rows(x, activation_bits)
    found = reference.w4a8_matmul(x, *parts, 32, activation_bits)
    torch.testing.assert_close(found, reference.dequant_matmul(codes * scales[:, None], *parts, 32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products(kernels: str, bits: int, shape: tuple[int, int, int]) -> None:  # noqa: F811
    parts = _sample(*shape, bits)
    packed = cpu_matmul.pack(*parts, bits, shape[2])
    assert packed.layout == ("tiles" if kernels == "native" else "codes")
    for rows in ROWS:
        x = _rows(rows, shape[1])
        for activation_bits in (4, 8):
            _assert_close(w4a8_matmul(x, packed, activation_bits), x, parts, shape[2], activation_bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_of_activations_and_bias(kernels: str, dtype: torch.dtype) -> None:  # noqa: F811
    parts, x = _sample(70, 128, 64, 4), _rows(3, 128).to(dtype)
    packed = cpu_matmul.pack(*parts, 4, 64)
    for bias in (None, torch.randn(70), torch.randn(70).to(torch.float16)):
        _assert_close(w4a8_matmul(x, packed, 8, bias), x, parts, 64, 8, bias)


def test_torch_int4_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers below 2^7 are exact in bfloat16, to which torch rounds its result: half a unit in the last place of the sum of
    codes times inputs. Twice that is allowed, because the zero points are added afterwards."""
    monkeypatch.setattr(library, "load", lambda: None)
    parts, x = _sample(64, 256, 64, 4), _rows(3, 256)
    packed = cpu_matmul.pack(parts[0], parts[1].to(torch.bfloat16).float(), parts[2], 4, 64)
    assert packed.layout == "int4"
    codes, scales = reference.quantize_rows(x, 8)
    wanted = reference.w4a8_matmul(x, parts[0], parts[1].to(torch.bfloat16).float(), parts[2], 64, 8)
    bound = 2.0**-7 * (codes.float().abs() * scales[:, None]) @ (8.1 * parts[1].repeat_interleave(64, 1)).T
    assert bool(((w4a8_matmul(x, packed, 8) - wanted).abs() <= bound).all())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_sums_fit(bits: int, sign: int) -> None:
    """All codes and inputs are extreme, and groups are long enough for intermediate sums to reach their maximum."""
    most = (1 << bits) - 1
    codes = torch.full((32, 2048), most, dtype=torch.uint8)
    packed = cpu_matmul.pack(codes, torch.ones(32, 2), torch.zeros(32, 2, dtype=torch.uint8), bits, 1024)
    for rows in ROWS:
        found = w4a8_matmul(torch.full((rows, 2048), 127.0 * sign), packed, 8)
        assert torch.equal(found, torch.full((rows, 32), 127.0 * sign * most * 2048))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_row_depends_on_nothing_but_itself(bits: int, threads: int) -> None:  # noqa: F811
    packed = cpu_matmul.pack(*_sample(100, 320, 64, bits), bits, 64)
    x = _rows(12, 320)
    found = w4a8_matmul(x, packed, 8)
    torch.set_num_threads(1)
    assert torch.equal(found, torch.cat([w4a8_matmul(row[None], packed, 8) for row in x]))
