"""CPU matrix products against the reference, by the native kernels and by torch's."""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.matmul_samples import ROWS, SHAPES, Weight, assert_dense_close, make_dense, make_rows, make_weight, packed_weight
from helpers.native_cases import kernels, threads  # noqa: F401
from quantkit.kernels import reference
from quantkit.kernels.cpu import library
from quantkit.kernels.cpu import matmul as cpu_matmul

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32


def _assert_close(found: Tensor, x: Tensor, weight: Weight, bias: Tensor | None = None) -> None:
    """Float32 sums are off by at most K * 2^-24 of the sum of magnitudes, typically by sqrt(K) * 2^-24: 2^-18 covers both sums
    of a product, that of codes and that of zero points. The native kernels' sums are exact sums of integers, but their inputs
    are rounded: by half of 1/32639 of the largest of a group, plus a little for the rounding of the quotient. The result is
        rounded
    to x's type."""
    wanted = reference.dequant_matmul(x, weight.codes, weight.scales, weight.zeros, weight.group, bias)
    size = reference.dequant_matmul(x.abs(), weight.codes, weight.scales, torch.zeros_like(weight.zeros), weight.group)
    size += reference.dequant_matmul(x.abs(), torch.zeros_like(weight.codes), -weight.scales, weight.zeros, weight.group)
    groups = x.float().abs().unflatten(1, (weight.scales.shape[1], -1))
    moved = 0.501 / 32639 * groups.amax(-1, keepdim=True).expand_as(groups).flatten(1) @ weight.dense.abs().T
    assert found.dtype == x.dtype
    assert found.shape == wanted.shape
    allowed = 2.0**-18 * size + moved + torch.finfo(x.dtype).eps * wanted.abs() + 1e-30
    worst = ((found.float() - wanted).abs() / allowed).max()
    assert bool(worst <= 1), f"off by {worst:.2f} times what is allowed"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_products(kernels: str, bits: int, shape: tuple[int, int, int]) -> None:  # noqa: F811
    weight = make_weight(*shape, bits)
    packed = packed_weight(weight)
    # torch's int4 product is in bfloat16 and has a separate test.
    assert packed.layout == ("tiles" if kernels == "native" else "codes")
    for rows in ROWS:
        x = make_rows(rows, shape[1])
        _assert_close(cpu_matmul.matmul(x, packed), x, weight)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32])
def test_types_of_activations_and_bias(kernels: str, dtype: torch.dtype) -> None:  # noqa: F811
    weight = make_weight(70, 128, 64, symmetric=True)
    x = make_rows(3, 128, dtype)
    for bias in (None, torch.randn(70), torch.randn(70).to(FLOAT16)):
        _assert_close(cpu_matmul.matmul(x, packed_weight(weight), bias), x, weight, bias)


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("bits", [3, 4])
def test_torch_int4_products(monkeypatch: pytest.MonkeyPatch, bits: int, rows: int) -> None:
    """With operands that bfloat16 holds exactly, only torch's result, sum x (q - 8) s, is rounded: by half a unit in
    bfloat16's last place. Twice that is allowed, because another sum is added afterwards."""
    monkeypatch.setattr(library, "load", lambda: None)
    weight = make_weight(64, 256, 64, bits)
    packed = packed_weight(weight)
    assert packed.layout == "int4"
    x = make_rows(rows, 256, BFLOAT16).float()
    bound = 2.0**-7 * x.abs() @ (8 * weight.scales.repeat_interleave(64, 1)).T
    assert bool(((cpu_matmul.matmul(x, packed) - x @ weight.dense.T).abs() <= bound).all())
    assert bool(((cpu_matmul.dequantize(packed) - weight.dense).abs() <= 2.0**-7 * 8 * weight.scales.max()).all())


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32])
@pytest.mark.parametrize(("rows", "columns"), [(33, 64), (50, 101), (7, 13), (1, 1), (9, 48), (11, 2500)])
def test_dense_products_are_sums_of_floats(dtype: torch.dtype, rows: int, columns: int) -> None:
    """Nothing is rounded but sums, and inputs to the type of the weight where the processor multiplies bfloat16."""
    assert library.load() is not None
    weight = make_dense(rows, columns, dtype)
    for count in ROWS:
        assert_dense_close(make_rows(count, columns), weight)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32])
def test_dense_products_without_a_compiler(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(library, "load", lambda: None)
    weight, x = torch.randn(50, 101).to(dtype), make_rows(3, 101, dtype)
    bias = torch.randn(50)
    found = cpu_matmul.matmul(x, cpu_matmul.pack_dense(weight), bias)
    wanted = x.double() @ weight.double().T + bias
    # float32 sums, then two roundings to the type: of the product, and of its sum with the bias.
    bound = torch.finfo(dtype).eps * (wanted.abs() + bias.abs()) + 2.0**-17 * (x.double().abs() @ weight.double().abs().T)
    assert found.dtype == dtype
    assert bool(((found.double() - wanted).abs() <= bound).all())


def test_dense_weights_may_lie_anywhere(tmp_path: Path) -> None:
    """Mapped from a file, at an address that is not aligned to vectors; nothing past the last row is read."""
    numbers = torch.randn(7 * 45).to(BFLOAT16)
    (tmp_path / "weights").write_bytes(b"\0\0" + numbers.view(torch.uint8).numpy().tobytes())
    stored = torch.from_file(str(tmp_path / "weights"), shared=False, size=1 + 7 * 45, dtype=BFLOAT16)[1:].view(7, 45)
    x = make_rows(2, 45)
    assert torch.equal(
        cpu_matmul.matmul(x, cpu_matmul.pack_dense(stored)),
        cpu_matmul.matmul(x, cpu_matmul.pack_dense(numbers.view(7, 45).clone())),
    )
    assert cpu_matmul.pack_dense(stored).data.data_ptr() == stored.data_ptr()


@pytest.mark.parametrize("bits", [2, 4, 8, 0])
def test_a_row_depends_on_nothing_but_itself(bits: int, threads: int) -> None:  # noqa: F811
    """Greedy decoding must give the same text alone and in a batch, on one thread and on many."""
    weight = (
        packed_weight(make_weight(100, 2560, 64, bits)) if bits else cpu_matmul.pack_dense(torch.randn(100, 2560).to(BFLOAT16))
    )
    x = make_rows(200, 2560)
    found = [cpu_matmul.matmul(x[:rows], weight) for rows in ROWS]
    torch.set_num_threads(1)
    alone = torch.cat([cpu_matmul.matmul(row[None], weight) for row in x])
    for rows, out in zip(ROWS, found, strict=True):
        assert torch.equal(out, alone[:rows])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("zero", [0, 255])
def test_the_largest_sums_fit(zero: int, sign: int) -> None:
    """All codes, zero points and inputs are extreme, and groups are long enough for intermediate sums to reach their
    maximum.
    """
    codes, zeros = torch.full((32, 2048), 255 - zero, dtype=torch.uint8), torch.full((32, 2), zero, dtype=torch.uint8)
    packed = cpu_matmul.pack(codes, torch.ones(32, 2), zeros, 8, 1024)
    for rows in ROWS:
        found = cpu_matmul.matmul(torch.full((rows, 2048), 32767.0 * sign), packed)
        wanted = 32767.0 * sign * (255 - 2 * zero) * 2048
        # Eight runs are summed in float32.
        assert bool(((found - wanted).abs() <= 8 * 2.0**-24 * abs(wanted)).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_not_finite_spoils_its_row_and_no_other(bits: int, value: float) -> None:
    packed = packed_weight(make_weight(70, 520, -1, bits))
    for rows in ROWS:
        x = make_rows(rows, 520)
        wanted = cpu_matmul.matmul(x, packed)
        x[rows // 2, 300], wanted[rows // 2] = value, torch.nan
        torch.testing.assert_close(cpu_matmul.matmul(x, packed), wanted, rtol=0, atol=0, equal_nan=True)


def test_inputs_of_any_size() -> None:
    """Each group of inputs has its own scale; groups of zeros, and of numbers too small for a scale, count as zero."""
    weight = make_weight(70, 256, 64, 4)
    x = make_rows(3, 256).view(3, 4, 64) * torch.tensor([1e-12, 1e-42, 1e30, 0.0])[:, None]
    _assert_close(cpu_matmul.matmul(x.view(3, 256), packed_weight(weight)), x.view(3, 256), weight)
    x[:, 2] = 0
    _assert_close(cpu_matmul.matmul(x.view(3, 256), packed_weight(weight)), x.view(3, 256), weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_come_back_exactly(kernels: str, bits: int, shape: tuple[int, int, int]) -> None:  # noqa: F811
    weight = make_weight(*shape, bits)
    packed, dense = packed_weight(weight), weight.dense
    assert torch.equal(cpu_matmul.dequantize(packed), dense)
    some = slice(shape[0] // 3, shape[0] - shape[0] // 4)
    assert torch.equal(cpu_matmul.dequantize(packed, some.start, some.stop, BFLOAT16), dense[some].to(BFLOAT16))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_of_any_float(bits: int, shape: tuple[int, int, int], symmetric: bool) -> None:
    """Scales that float16 holds exactly, even subnormals, are stored in it; others are stored in float32. Neither is
    rounded.
    """
    weight = make_weight(*shape, bits, symmetric)
    for scales, kept in (
        ((weight.scales * 2.0**-14).half().float(), FLOAT16),
        (weight.scales + 2.0**-20, FLOAT32),
        (weight.scales * 2.0**-20, FLOAT32),
        (weight.scales * 2.0**30, FLOAT32),
    ):
        changed = replace(weight, scales=scales)
        packed = packed_weight(changed)
        assert packed.scales is not None
        assert packed.scales.dtype == kept
        assert (packed.zeros is None) == bool((weight.zeros == weight.zeros[0, 0]).all())
        assert torch.equal(cpu_matmul.dequantize(packed), changed.dense)
        for rows in (1, 7):
            x = make_rows(rows, shape[1])
            _assert_close(cpu_matmul.matmul(x, packed), x, changed)


def test_bytes_that_a_product_reads() -> None:
    # Half a byte per weight; per group, a float16 scale and one byte of zero point, in words of four.
    assert packed_weight(make_weight(64, 128, 64)).nbytes == 64 * (128 // 2 + 2 * 2 + 4)
    assert packed_weight(make_weight(64, 128, 64, symmetric=True)).nbytes == 64 * (128 // 2 + 2 * 2)
    assert cpu_matmul.pack_dense(torch.zeros(3, 5)).nbytes == 60


@pytest.mark.parametrize("shape", [(70, 576, 64), (33, 100, 100), (40, 60, 20), (64, 520, -1)])
@pytest.mark.parametrize("activation_bits", [0, 4, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_columns_in_another_order(bits: int, activation_bits: int, shape: tuple[int, int, int]) -> None:
    """Equal to the bit to permuting x beforehand."""
    lib = library.load()
    assert lib is not None
    packed, x = packed_weight(make_weight(*shape, bits)), make_rows(3, shape[1])
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(0)).int()
    matrix = ctypes.byref(packed.matrix(None, activation_bits, order))
    prepared, out = torch.empty(3 * lib.quantkit_prepared_floats(matrix)), torch.empty(3, shape[0])
    values, *buffers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, prepared, out))
    lib.quantkit_matmul(matrix, values, ctypes.c_int64(3), *buffers, 2)
    assert torch.equal(out, cpu_matmul.native_matmul(lib, x[:, order], packed, None, activation_bits))
