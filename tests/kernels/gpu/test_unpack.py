"""The assembly that unpacks codes, emulated here instruction by instruction over all words."""

import re
from itertools import product

import pytest
import torch
from torch import Tensor

from quantkit.kernels.gpu.matmul.unpack import field_position, magic_offset, plane_count, unpack_assembly

BITS = (2, 3, 4, 8)
TYPES = {10: torch.float16, 7: torch.bfloat16}
CASES = [(bits, mantissa, plane) for bits, mantissa in product(BITS, TYPES) for plane in range(plane_count(bits))]
ALL_WORDS = torch.arange(1 << 16)


def _halves(register: Tensor) -> tuple[Tensor, Tensor]:
    return register & 0xFFFF, register >> 16


def _lanes(register: Tensor, dtype: torch.dtype) -> Tensor:
    """Both lanes of 32-bit registers [R] as floats [2, R]."""
    halves = torch.stack(_halves(register))
    return (halves - (halves >> 15 << 16)).to(torch.int16).view(dtype)


def _register(lanes: Tensor) -> Tensor:
    low, high = lanes.view(torch.int16).long() & 0xFFFF
    return low | high << 16


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    """lop3: at each bit position, bit 4a + 2b + c of the table."""
    out = torch.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out & 0xFFFFFFFF


def _run(code: str, registers: dict[str, Tensor]) -> Tensor:
    """The value of $0 after executing `code`; 32-bit registers are held in int64."""
    body = code.removeprefix("{ .reg .b32 t, u, v, one; ").removesuffix(" }")

    def value(name: str) -> Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 0)).expand_as(registers["$1"])

    for operation, target, rest in re.findall(r"(\S+) (\S+), ([^;]+);", body):
        names = rest.split(", ")
        if operation == "mov.b32":
            registers[target] = value(names[0])
        elif operation == "shr.b32":
            registers[target] = value(names[0]) >> int(names[1])
        elif operation == "shl.b32":
            registers[target] = value(names[0]) << int(names[1]) & 0xFFFFFFFF
        elif operation == "lop3.b32":
            a, b, c = (value(name) for name in names[:3])
            registers[target] = _lop3(a, b, c, int(names[3], 0))
        elif operation == "add.rn.f16x2":
            a, b = (_lanes(value(name), torch.float16) for name in names)
            registers[target] = _register(a + b)
        elif operation == "fma.rn.bf16x2":
            a, b, c = (_lanes(value(name), torch.bfloat16).float() for name in names)
            registers[target] = _register((a * b + c).bfloat16())
        else:
            raise AssertionError(operation)
    return registers["$0"]


def _codes(words: Tensor, thirds: Tensor, bits: int, plane: int) -> Tensor:
    """The codes, by the definition of the layout."""
    if bits == 3:
        return words >> 2 * (plane % 8) & 3 | (thirds >> 2 * (plane % 8) + plane // 8 & 1) << 2
    return words >> bits * plane & (1 << bits) - 1


@pytest.mark.parametrize(("bits", "mantissa", "plane"), CASES)
def test_assembly_makes_code_minus_zero(bits: int, mantissa: int, plane: int) -> None:
    dtype = TYPES[mantissa]
    # The other lane and the third bits are different words, so that a leak between them would show.
    shuffled = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(plane))
    thirds = shuffled.flip(0) if bits == 3 else torch.zeros_like(ALL_WORDS)
    pairs = {"$1": ALL_WORDS | shuffled << 16, "$3": thirds | thirds.roll(7) << 16}
    for zero in {0, 1, (1 << bits) // 2, (1 << bits) - 1}:
        offset = torch.tensor(-magic_offset(bits, plane, mantissa) - zero, dtype=dtype)
        assert offset == -magic_offset(bits, plane, mantissa) - zero, "not exact"
        twice = _register(offset.expand(2, 1)).expand_as(ALL_WORDS)
        found = _lanes(_run(unpack_assembly(bits, plane, mantissa), {**pairs, "$2": twice}), dtype)
        for lane, words, third in zip(found, _halves(pairs["$1"]), _halves(pairs["$3"]), strict=True):
            assert torch.equal(lane.float(), (_codes(words, third, bits, plane) - zero).float())


@pytest.mark.parametrize(("bits", "mantissa", "plane"), CASES)
def test_fields_end_up_inside_the_mantissa(bits: int, mantissa: int, plane: int) -> None:
    down, at = field_position(bits, plane, mantissa)
    stride = 2 if bits == 3 else bits
    assert down + at == stride * (plane % (16 // stride))
    assert at + bits <= max(mantissa, 8)
