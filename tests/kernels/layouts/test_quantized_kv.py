"""The reference for quantized caches: how far the numbers read may be from those written, in quantization steps."""

import pytest
import torch
from torch import Tensor

from helpers.quantized_samples import make_quantized_kv
from quantkit.kernels import reference
from quantkit.kernels.cpu import attention as cpu_attention
from quantkit.kernels.cpu import library
from quantkit.kernels.layouts import kv_codec
from quantkit.kernels.layouts.quantized_kv import QuantizedKV

BLOCKS, SIZE, HEADS, DIM = 3, 8, 2, 12

#: Levels of the quantization grid.
STEPS = {"int8": 255, "int4": 15, "int4+4": 15}


def _round_trip(scheme: str, rows: Tensor, *, keys: bool, draft: bool = False) -> Tensor:
    """The contents of full pages, [blocks, size, heads, dim]."""
    pages = torch.tensor([2, 0, 1], dtype=torch.int32)
    one, other = (make_quantized_kv(scheme, BLOCKS, SIZE, HEADS, DIM, keys=k, pages=pages) for k in (keys, not keys))
    flat, slots = rows.flatten(0, 1), torch.arange(BLOCKS * SIZE)
    reference.kv_write(*((flat, flat, one, other) if keys else (flat, flat, other, one)), slots)
    return kv_codec.read_blocks(one, torch.arange(BLOCKS), draft)


def _rows() -> Tensor:
    """Numbers of several magnitudes, an outlier channel as in keys, a constant channel and a constant token."""
    rows = torch.randn(BLOCKS, SIZE, HEADS, DIM, generator=torch.Generator().manual_seed(3))
    rows[0] *= 1e-3
    rows[..., 5] += 40
    rows[1, :, :, 7] = 1.5
    rows[2, 3] = -0.25
    return rows


@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("scheme", STEPS)
def test_an_error_is_at_most_half_a_step(scheme: str, keys: bool) -> None:
    """Rounding to the grid is off by scale / 2. float16 is off by 2^-11 in the minimum and, `levels` times, in the scale. A
    tail page is off by 2^-9 of the number. For 4+4 bit the residual is rounded to scale / 16 and ends at 7/16 of a step: scale
    / 16.
    """
    rows = _rows()
    found = _round_trip(scheme, rows, keys=keys)
    shared = 1 if keys and scheme != "int8" else -1
    low, high = rows.amin(shared, keepdim=True), rows.amax(shared, keepdim=True)
    step = (high - low) / STEPS[scheme]
    rounding = 2**-11 * (low.abs() + 2 * (high - low)) + 2**-25 * (STEPS[scheme] + 1)
    if scheme != "int8":
        rounding += 2**-8 * torch.maximum(low.abs(), high.abs())  # relative to the number, and to the ends of the grid
    bound = step / (16 if scheme == "int4+4" else 2) + rounding
    assert bool(((found - rows).abs() <= bound).all())
    # The bound is tight: half of it would not hold everywhere.
    assert bool(((found - rows).abs() > bound / 4).any())


@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
def test_the_upper_plane_is_the_int4_cache(keys: bool) -> None:
    draft = _round_trip("int4+4", _rows(), keys=keys, draft=True)
    assert torch.equal(draft, _round_trip("int4", _rows(), keys=keys))
    assert not torch.equal(draft, _round_trip("int4+4", _rows(), keys=keys))


def test_keys_share_a_scale_a_channel_and_values_one_a_token() -> None:
    """An outlier costs accuracy in its own channel, or in its own token, and nowhere else."""
    plain = torch.linspace(-1, 1, SIZE * HEADS * DIM).view(1, SIZE, HEADS, DIM).repeat(BLOCKS, 1, 1, 1)
    loud = plain.clone()
    loud[:, 2, :, 4] = 100.0
    for keys in (True, False):
        changed = (_round_trip("int4", plain, keys=keys) != _round_trip("int4", loud, keys=keys)).any(0).any(1)
        inside = torch.zeros(SIZE, DIM, dtype=torch.bool)
        inside[(slice(None), 4) if keys else (2, slice(None))] = True
        assert bool(changed.any())
        assert not bool((changed & ~inside).any())


@pytest.mark.parametrize("scheme", ["int4", "int4+4"])
def test_a_query_sees_its_own_page_in_16_bit(scheme: str) -> None:
    """If one token has all the weight, the output is that token's value: from its tail page, or quantized."""
    pages = torch.tensor([2, 0, 1], dtype=torch.int32)
    stores = [make_quantized_kv(scheme, BLOCKS, SIZE, 1, DIM, keys=keys, pages=pages) for keys in (True, False)]
    keys, values = torch.zeros(20, 1, DIM), torch.randn(20, 1, DIM, generator=torch.Generator().manual_seed(1))
    for seen, quantized in ((9, True), (15, True), (17, False), (18, False)):
        keys[:], keys[seen] = 0, 1
        reference.kv_write(keys, values, stores[0], stores[1], torch.arange(20))
        query = torch.full((1, 1, DIM), 100.0)
        table, start, length = torch.tensor([[0, 1, 2]]).int(), torch.tensor([0, 1]).int(), torch.tensor([19]).int()
        out = reference.paged_attention(query, stores[0], stores[1], table, start, length, scale=1.0)[0, 0]
        half = values[seen, 0].bfloat16().float()
        assert torch.equal(out, half) != quantized
        if quantized:
            assert torch.equal(out, kv_codec.read_blocks(stores[1], torch.arange(3)).flatten(0, 1)[seen, 0])


def test_a_page_can_be_settled_again() -> None:
    """Draft tokens fill a page, are rejected and overwritten: the page is the same as without them."""
    pages = torch.arange(BLOCKS, dtype=torch.int32)
    found, wanted = (
        [make_quantized_kv("int4", BLOCKS, SIZE, HEADS, DIM, keys=k, pages=pages) for k in (True, False)] for _ in "ab"
    )
    rows, wrong = _rows().flatten(0, 1)[:SIZE], _rows().flatten(0, 1)[SIZE : 2 * SIZE]
    reference.kv_write(rows[:5], rows[:5], found[0], found[1], torch.arange(5))
    reference.kv_write(wrong[5:], wrong[5:], found[0], found[1], torch.arange(5, SIZE))
    reference.kv_write(rows[5:], rows[5:], found[0], found[1], torch.arange(5, SIZE))
    reference.kv_write(rows, rows, wanted[0], wanted[1], torch.arange(SIZE))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.codes[0], other.codes[0])
        assert torch.equal(one.params[0], other.params[0])


def test_wrong_stores_are_refused() -> None:
    codes, params = torch.zeros(1, 2, 1, 4, dtype=torch.uint8), torch.zeros(1, 2, 1, 2, dtype=torch.float16)
    for wrong in ({"lower": codes}, {"by_channel": True}, {"tail_pages": codes.bfloat16()}):
        with pytest.raises(AssertionError):
            QuantizedKV(codes, params, **wrong)


def _every_float8() -> Tensor:
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    return codes[codes.isfinite()]


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_float8_is_rounded_as_torch_rounds_and_saturates(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 8-bit number, its neighbours, the midpoints between numbers, and numbers out of range."""
    if kernels == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    every = _every_float8().sort().values
    between = (every[1:] + every[:-1]) / 2
    inside = torch.cat([every, between, between.nextafter(torch.tensor(1e9)), between.nextafter(torch.tensor(-1e9))])
    x = torch.cat([inside, torch.tensor([449.0, 464.0, 1e9, torch.inf, -500.0])])[None, None]
    cache = torch.zeros(1, 1, 1, x.shape[2], dtype=torch.float8_e4m3fn)
    cpu_attention.kv_write(x, x, cache, cache.clone(), torch.tensor([0]))
    wanted = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(cache.float().flatten(), wanted.flatten())
    assert cache.float().flatten()[-5:].tolist() == [448, 448, 448, 448, -448]


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("counts", [[1, 1], [40, 9]])
def test_attention_reads_float8(kernels: str, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """All codes are read as torch reads them; sums differ in their order."""
    if kernels == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    numbers = _every_float8() / 64
    generator = torch.Generator().manual_seed(2)
    picks = torch.randint(len(numbers), (2, 10, 16, 3, 20), generator=generator)
    keys, values = numbers[picks].to(torch.float8_e4m3fn)
    query = torch.randn(sum(counts), 6, 20, generator=generator)
    table = torch.randperm(10, generator=generator).int().view(2, 5)
    batch = table, torch.tensor([0, *counts]).cumsum(0).int(), torch.tensor([77, 40]).int()
    found = cpu_attention.paged_attention(query, keys, values, *batch, scale=0.05)
    wanted = reference.paged_attention(query.double(), keys.double(), values.double(), *batch, scale=0.05)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)
