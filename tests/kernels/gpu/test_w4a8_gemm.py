"""W4A8 products against the reference: compiled if there is a GPU, else under Triton's interpreter.

The assembly is also run by an emulator of its few instructions, over all bytes.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.weights import DEVICE, Sample, activations, sample
from quantkit.kernels import reference
from quantkit.kernels.gpu.matmul.gemm_plan import Steps
from quantkit.kernels.gpu.matmul.quantize_rows import codes_per_byte, quantize_rows
from quantkit.kernels.gpu.matmul.w4a8_gemm import extract_assembly, groups_per_load, w4a8_gemm, w4a8_matmul
from quantkit.kernels.layouts.planes import block_columns

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
SMALL = {"block_n": 64, "warps": 2, "stages": 2}


def _assert_close(found: Tensor, x: Tensor, weight: Sample, bits: int, bias: Tensor | None = None) -> None:
    """Sums within a group are exact. Zero points, scales and sums over groups use float32, which is off by a few 2^-24 of the
    sum of magnitudes (2^-20 covers about 50 groups). The result is rounded to x's type: one unit in the last place, because
    the interpreter truncates."""
    group = weight.planes.group_size
    wanted = reference.w4a8_matmul(x, weight.codes, weight.scales, weight.zeros, group, bits, bias)
    codes, scales = reference.quantize_rows(x, bits)
    size = reference.dequant_matmul(codes.abs() * scales[:, None], weight.codes, weight.scales, -weight.zeros.int(), group)
    allowed = 2.0**-20 * size + torch.finfo(x.dtype).eps * wanted.abs() + torch.finfo(x.dtype).tiny
    assert found.dtype == x.dtype
    assert found.shape == wanted.shape
    worst = ((found.float() - wanted).abs() / allowed).max()
    assert worst <= 1, f"off by {worst:.2f} times what is allowed"


def _product(x: Tensor, weight: Sample, bits: int, splits: int = 1, bias: Tensor | None = None) -> Tensor:
    rounded = quantize_rows(x, bits, weight.planes.bits, weight.planes.group_size)
    return w4a8_gemm(rounded, weight.planes, bias, x.dtype, {**SMALL, "splits": splits})


def _column_order(bits: int, columns: int) -> list[int]:
    """The column at each position, computed independently: by block or half of one, field, word and byte of the word."""
    fields = codes_per_byte(bits)
    return [
        first + 16 * (byte * fields + field) + word
        for first in range(0, columns, 32 * fields)
        for field in range(fields)
        for word in range(16)
        for byte in range(2)
    ]


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32])
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize(
    ("bits", "columns", "group"), [(4, 576, 64), (2, 1000, 1000), (3, 1536, 96), (8, 48, 16), (4, 2304, 768)]
)
def test_rounded_rows(bits: int, columns: int, group: int, activation_bits: int, dtype: torch.dtype) -> None:
    x = activations(3, columns, dtype)
    x[1] = 0
    # Ties, in a row whose scale is 1.
    x[2] = torch.arange(columns, device=DEVICE).to(dtype) % 7 - 3.5
    x[2, 5] = 2 ** (activation_bits - 1) - 1
    found, (codes, scales) = quantize_rows(x, activation_bits, bits, group), reference.quantize_rows(x, activation_bits)
    padded = torch.nn.functional.pad(codes, (0, -columns % block_columns(bits)))
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.codes, padded[:, _column_order(bits, padded.shape[1])])
    assert torch.equal(found.sums, codes.int().unflatten(1, (-1, group)).sum(-1).T)


@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 576, 64), (3, 384, 128), (5, 320, 16), (2, 1000, -1)])
def test_few_rows(bits: int, activation_bits: int, rows: int, columns: int, group: int) -> None:
    weight = sample(70, columns, bits, group)
    x = activations(rows, columns, FLOAT16)
    _assert_close(_product(x, weight, activation_bits), x, weight, activation_bits)


@pytest.mark.parametrize("rows", [16, 33, 130])
def test_more_rows(rows: int) -> None:
    weight = sample(130, 512, 4, 128, BFLOAT16, symmetric=True)
    x = activations(rows, 512, BFLOAT16)
    _assert_close(_product(x, weight, 8), x, weight, 8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 48, 96, 192])
def test_groups_that_cut_blocks(bits: int, group: int) -> None:
    weight = sample(33, 576, bits, group)
    x = activations(2, 576, FLOAT16)
    _assert_close(_product(x, weight, 8), x, weight, 8)


@pytest.mark.parametrize("group", [128, -1])
@pytest.mark.parametrize("splits", [2, 3, 16])
def test_shares_of_the_columns_add_up(splits: int, group: int) -> None:
    """Zero points count once per group, even if a group's columns are split over several programs."""
    weight = sample(65, 640, 4, group, BFLOAT16)
    x, bias = activations(3, 640, BFLOAT16), torch.randn(65, device=DEVICE)
    out = _product(x, weight, 8, splits, bias)
    _assert_close(out, x, weight, 8, bias)
    assert torch.equal(out, _product(x, weight, 8, splits, bias))


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32])
def test_the_entry(dtype: torch.dtype) -> None:
    weight = sample(40, 600, 4, -1)
    wide = torch.full((3, 800), 1e4, device=DEVICE, dtype=dtype)
    wide[:2, 100:700] = activations(2, 600, dtype)
    _assert_close(w4a8_matmul(wide[:2, 100:700], weight.planes, 8), wide[:2, 100:700], weight, 8)
    assert w4a8_matmul(wide[:0, 100:700], weight.planes, 8).shape == (0, 40)
    for wrong in ((wide, 8), (wide[0, :600], 8), (wide[:, :600], 5)):
        with pytest.raises(AssertionError):
            w4a8_matmul(wrong[0], weight.planes, wrong[1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "group"), [(576, 48), (576, 64), (576, 96), (1000, 1000), (1536, 512), (14336, 128)])
def test_parts_are_the_groups_of_a_load(bits: int, columns: int, group: int) -> None:
    steps = Steps.of(bits, group, columns)
    span = 2 * steps.words * codes_per_byte(bits)
    assert steps.count * steps.loads * span * (2 if bits == 3 else 1) == -(-columns // block_columns(bits)) * block_columns(
        bits
    )
    wanted = max(len({k // group for k in range(at, min(at + span, columns))}) for at in range(0, columns, span))
    assert groups_per_load(group, span, columns) == wanted


def _run(code: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Execute PTX (shr, shl, and, or, xor, mov) on uint32 arrays."""
    values = {f"${i + 1}": array for i, array in enumerate(inputs)}
    apply: dict[str, Callable[..., np.ndarray]] = {
        "shr": np.right_shift,
        "shl": np.left_shift,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "mov": lambda value: value,
    }
    for name, operands in re.findall(r"(\w+)\.b32 ([^;]+);", code.replace(".reg .b32 t, u;", "")):
        target, *sources = (operand.strip() for operand in operands.split(","))
        read = [values[source] if source in values else np.uint32(int(source, 0)) for source in sources]
        values[target] = apply[name](*read)
    return values["$0"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_assembly_cuts_codes_out_of_bytes(bits: int) -> None:
    generator = np.random.default_rng(0)
    low, high_bits = generator.integers(0, 1 << 32, (2, 4096), dtype=np.uint32)
    both = [each.view(np.uint8).astype(np.int32) for each in (low, high_bits)]
    for half in range(2 if bits == 3 else 1):
        for field in range(codes_per_byte(bits)):
            found = _run(extract_assembly(bits, field, half), (low, high_bits)).view(np.int8)
            if bits == 8:
                wanted = both[0] - 128
            elif bits == 3:
                wanted = (both[0] >> 2 * field & 3) + 4 * (both[1] >> 2 * field + half & 1)
            else:
                wanted = both[0] >> bits * field & (1 << bits) - 1
            assert (found == wanted).all()
