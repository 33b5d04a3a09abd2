"""The layout that GPU kernels read: where each code is stored, and that packing loses nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.kernels.layouts.planes import block_columns, fits, from_planes, to_planes

BITS = (2, 3, 4, 8)


def _codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 600), st.integers(0, 99))
def test_codes_come_back(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = _codes(rows, columns, bits, seed)
    weight = to_planes(codes, torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.uint8), bits, -1)
    assert torch.equal(from_planes(weight), codes)
    blocks = -(-columns // block_columns(bits))
    stored = weight.words.shape[1] + (0 if weight.high_bits is None else weight.high_bits.shape[1])
    assert stored * 16 == blocks * block_columns(bits) * bits


@pytest.mark.parametrize("bits", BITS)
def test_every_code_lies_where_the_layout_says(bits: int) -> None:
    columns = 2 * block_columns(bits)
    codes = _codes(1, columns, bits)
    weight = to_planes(codes, torch.ones(1, 1), torch.zeros(1, 1), bits, -1)
    words = [int(word) & 0xFFFF for word in weight.words[0]]
    thirds = [] if weight.high_bits is None else [int(word) & 0xFFFF for word in weight.high_bits[0]]
    low = 2 if bits == 3 else bits
    span = 256 // low
    for k in range(columns):
        block, plane, j = k // span, k % span // 16, k % 16
        found = words[16 * block + j] >> low * plane & (1 << low) - 1
        if bits == 3:
            found |= (thirds[k // 256 * 16 + j] >> 2 * (k % 128 // 16) + k % 256 // 128 & 1) << 2
        assert found == codes[0, k], k


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_and_zeros_come_back(dtype: torch.dtype) -> None:
    scales = torch.rand(5, 3).to(dtype).float() + 2.0**-8
    zeros = torch.tensor([0, 1, 127, 128, 255], dtype=torch.uint8)[:, None].repeat(1, 3)
    weight = to_planes(_codes(5, 48, 8), scales.to(dtype).float(), zeros, 8, 16, dtype)
    assert weight.scales.dtype == dtype
    assert torch.equal(weight.scales, scales.to(dtype).T)
    assert torch.equal(weight.zeros, zeros.T.to(dtype))


@pytest.mark.parametrize(
    ("scale", "asked", "stored"),
    [
        (1.0, torch.float16, torch.float16),
        (1.0, torch.bfloat16, torch.bfloat16),
        (1 + 2.0**-10, torch.bfloat16, torch.float16),  # only float16 holds it
        (2.0**-40, torch.float16, torch.bfloat16),  # only bfloat16 does
        (1 + 2.0**-20, torch.bfloat16, torch.bfloat16),  # neither does
    ],
)
def test_scales_keep_their_values_where_a_16_bit_type_holds_them(
    scale: float, asked: torch.dtype, stored: torch.dtype
) -> None:
    weight = to_planes(_codes(1, 16, 4), torch.full((1, 1), scale), torch.zeros(1, 1), 4, -1, asked)
    assert weight.scale_type == stored
    assert weight.scales.item() == torch.tensor(scale).to(stored).item()


def test_groups_are_whole_planes_or_the_row() -> None:
    assert fits(576, 64)
    assert fits(576, 96)
    assert fits(100, -1)
    assert fits(100, 100)
    assert not fits(100, 64)
    assert not fits(96, 24)


def test_moving_keeps_everything() -> None:
    weight = to_planes(_codes(3, 300, 3), torch.ones(3, 1), torch.zeros(3, 1), 3, -1)
    moved = weight.to("cpu")
    assert torch.equal(from_planes(moved), from_planes(weight))
    assert moved.nbytes == weight.nbytes == 3 * 512 * 3 // 8 + 3 * 4
