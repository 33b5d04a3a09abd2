"""Dense bit packing, compared with one big Python integer per row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.slow_formats import UNTIMED, bitstream
from quantkit.formats.packing import pack, unpack, words


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """A number of bits, and rows of equal length with values of that many bits."""
    bits, count = draw(st.integers(1, 8)), draw(st.integers(1, 70))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


@UNTIMED
@given(tables())
def test_every_bit_lies_where_the_stream_has_it(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    packed = pack(torch.tensor(rows), bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (len(rows), words(len(rows[0]), bits))
    assert packed.tolist() == [bitstream(row, bits) for row in rows]


@UNTIMED
@given(tables())
def test_unpack_gives_back_what_was_packed(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    unpacked = unpack(pack(torch.tensor(rows), bits), bits, len(rows[0]))
    assert unpacked.dtype == torch.uint8
    assert unpacked.tolist() == rows


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_full_words_are_minus_one(bits: int) -> None:
    full = torch.full((2, 32), 2**bits - 1)
    assert pack(full, bits).tolist() == [[-1] * bits] * 2
    assert torch.equal(unpack(pack(full, bits), bits, 32), full.to(torch.uint8))


def test_any_memory_layout_packs_alike() -> None:
    """Formats pack transposed views, which are not contiguous."""
    values = torch.arange(64).view(8, 8) % 16
    assert torch.equal(pack(values.T, 4), pack(values.T.contiguous(), 4))


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (10, 1), (11, 2), (32, 3), (33, 4), (96, 9)])
def test_words_are_counted_up(count: int, expected: int) -> None:
    assert words(count, 3) == expected
