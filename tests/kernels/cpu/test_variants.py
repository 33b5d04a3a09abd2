"""The kernels that are compiled for other processors than the one at hand, as far as it can run them."""

import ctypes
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.matmul_samples import ROWS, SHAPES, assert_dense_close, make_dense, make_rows, make_weight, packed_weight
from helpers.native_cases import variant, variant_library  # noqa: F401
from helpers.paged_samples import Batch, Heads, assert_attends, make_batch
from helpers.quantized_samples import SCALE, SCHEMES, assert_right, make_quantized
from quantkit.kernels.cpu import attention as cpu_attention
from quantkit.kernels.cpu import gram, library, variants
from quantkit.kernels.cpu import matmul as cpu_matmul
from quantkit.kernels.cpu.row_max import row_max
from quantkit.kernels.cpu.w4a8 import w4a8_matmul

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_products_have_the_same_bits(
    bits: int,
    shape: tuple[int, int, int],
    variant_library: ctypes.CDLL,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever instructions multiply integers, and however wide vectors are."""
    packed = packed_weight(make_weight(*shape, bits))

    def results() -> list[Tensor]:
        samples = [make_rows(rows, shape[1]) for rows in ROWS]
        quantized = [w4a8_matmul(x, packed, activation_bits) for x in samples[:5] for activation_bits in (4, 8)]
        return [cpu_matmul.matmul(x, packed) for x in samples] + quantized

    wanted = results()
    monkeypatch.setattr(library, "load", lambda: variant_library)
    for one, other in zip(results(), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_sums_fit(bits: int, sign: int) -> None:
    """All codes, zero points and inputs are extreme. Sums of quantized inputs are exact; eight of the others are added in
    float32."""
    most = (1 << bits) - 1
    for zero in (0, most):
        codes, zeros = torch.full((32, 2048), most - zero, dtype=torch.uint8), torch.full((32, 2), zero, dtype=torch.uint8)
        packed = cpu_matmul.pack(codes, torch.ones(32, 2), zeros, bits, 1024)
        for rows in (1, 4, 7, 33):
            wanted = float(sign * (most - 2 * zero) * 2048)
            found = cpu_matmul.matmul(torch.full((rows, 2048), 32767.0 * sign), packed)
            assert bool(((found - 32767 * wanted).abs() <= 8 * 2.0**-24 * abs(32767 * wanted)).all())
            assert bool((w4a8_matmul(torch.full((rows, 2048), 127.0 * sign), packed, 8) == 127 * wanted).all())


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(33, 64), (50, 101), (7, 13), (1, 1), (11, 2500)])
def test_dense_products_are_sums_of_floats(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = make_dense(rows, columns, dtype)
    packed = cpu_matmul.pack_dense(weight)
    x = make_rows(200, columns)
    alone = torch.cat([cpu_matmul.matmul(row[None], packed) for row in x])
    for count in ROWS:
        assert_dense_close(x[:count], weight)
        assert torch.equal(cpu_matmul.matmul(x[:count], packed), alone[:count]), "a row depends on other rows"


def _batch(lengths: list[int], counts: list[int], dtype: torch.dtype) -> Batch:
    batch = make_batch(lengths, counts, Heads(3, 3, 64, 48), dtype=dtype)
    return Batch(*(getattr(batch, field.name).cpu() for field in fields(batch)))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: torch.dtype) -> None:
    both = _batch([600, 300], [1, 30], dtype)
    whole = cpu_attention.paged_attention(*both.tensors, scale=SCALE)
    assert_attends(whole, both, scale=SCALE)
    options: dict[str, Any] = {"softcap": 5.0, "window": 40, "sinks": torch.linspace(-2, 30, 9)}
    assert_attends(cpu_attention.paged_attention(*both.tensors, scale=SCALE, **options), both, scale=SCALE, **options)
    second = replace(both, block_table=both.block_table[1:], seq_lens=both.seq_lens[1:])
    for count in (1, 4):
        few = replace(second, query=both.query[-count:], query_start=torch.tensor([0, count], dtype=torch.int32))
        assert torch.equal(cpu_attention.paged_attention(*few.tensors, scale=SCALE), whole[-count:]), "depends on other rows"


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_attention_to_quantized_caches(scheme: str) -> None:
    assert_right(cpu_attention.paged_attention, make_quantized(scheme, [200, 70], [21, 1], Heads(3, 3, 64, 48)))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_row_max(value: float) -> None:
    for width in (1, 7, 8, 31, 33, 513, 4999):
        rows = torch.randint(-50, 50, (3, width)).float()
        rows[1, width // 3] = value
        values, places = row_max(rows)
        wanted_values, wanted_places = rows.max(-1)
        torch.testing.assert_close(torch.tensor(values), wanted_values, rtol=0, atol=0, equal_nan=True)
        assert places == wanted_places.tolist()


def test_gram_products_have_the_same_bits(
    variant_library: ctypes.CDLL,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not variant_library.quantkit_gram_supported():
        pytest.skip("the variant does not have the kernel")
    x, sums = torch.randn(300, 145).bfloat16(), torch.randn(145, 145)
    native = sums.clone()
    gram.add_product(native, gram.pack_rows(x), gram.pack_rows(x), [slice(0, 145)])
    monkeypatch.setattr(library, "load", lambda: variant_library)
    gram.add_product(sums, gram.pack_rows(x), gram.pack_rows(x), [slice(0, 145)])
    assert torch.equal(sums, native)


def test_a_variant_runs_where_the_processor_has_all_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for flags, names in (
        ("flags\t\t: sse2", []),
        ("flags\t\t: sse2 fma f16c avx2 avx_vnni", ["fma", "avx2", "avx_vnni"]),
        ("flags\t\t: fma f16c avx2 avx512f avx512bw avx512vl avx512dq", ["fma", "avx2", "avx512bw"]),
    ):
        monkeypatch.setattr(variants, "_cpuinfo", lambda *keys, flags=flags: [flags])
        assert list(variants.runnable()) == names
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(variants, "_cpuinfo", lambda *keys: ["Features\t: fp asimd asimddp"])
    assert list(variants.runnable()) == ["neon", "dotprod"]
