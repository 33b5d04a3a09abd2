"""The Triton kernels on quantized caches against the reference: compiled if there is a GPU, else under Triton's
interpreter.
"""

from dataclasses import replace

import pytest
import torch

from helpers.paged_samples import DEVICE, Heads
from helpers.quantized_samples import SCALE, SCHEMES, Quantized, assert_right, empty_like, make_quantized, slots_of
from quantkit.kernels import reference
from quantkit.kernels.gpu.attention.paged_args import AttentionArgs, ScoreParams
from quantkit.kernels.gpu.attention.paged_attention import paged_attention
from quantkit.kernels.gpu.attention.paged_decode import paged_decode
from quantkit.kernels.gpu.kv.kv_write import kv_write

#: New tokens of two sequences: for one kernel, for the other, and for both.
STEPS = {"decode": [1, 1], "verify": [3, 8], "prefill": [33, 9], "mixed": [21, 1]}


def _float32(case: Quantized) -> Quantized:
    """The case with tail pages in the query's type."""
    if case.keys.tail_pages is None:
        return case
    assert case.values.tail_pages is not None
    keys, values = (
        replace(case.keys, tail_pages=case.keys.tail_pages.float()),
        replace(case.values, tail_pages=case.values.tail_pages.float()),
    )
    return replace(case, keys=keys, values=values)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_steps(scheme: str, step: str) -> None:
    assert_right(paged_attention, _float32(make_quantized(scheme, [90, 70], STEPS[step], Heads())))


@pytest.mark.parametrize("step", ["verify", "prefill"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_float16_queries(scheme: str, step: str) -> None:
    """Keys are off by 2^-11, scores by 16 such products times 0.3, weights by half a percent, and sums of values by 0.02."""
    case = make_quantized(scheme, [90, 70], STEPS[step], Heads())
    query, rest = case.batch.query, case.tensors[1:]
    found = paged_attention(query.half(), *rest, scale=SCALE)
    wanted = reference.paged_attention(query.double(), *rest, scale=SCALE)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-2)


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_block_sizes_windows_and_sinks(scheme: str, block_size: int) -> None:
    case = _float32(make_quantized(scheme, [140, 64], [21, 3], Heads(1, 2, 24, 40), block_size))
    assert_right(paged_attention, case)
    assert_right(paged_attention, case, window=40, softcap=5.0, sinks=torch.linspace(-2, 3, 2, device=DEVICE))


@pytest.mark.parametrize("step", ["decode", "verify", "prefill"])
def test_a_draft_reads_the_upper_plane(step: str) -> None:
    case = _float32(make_quantized("int4+4", [90, 70], STEPS[step], Heads()))
    assert_right(paged_attention, case, draft=True)
    draft, both = (paged_attention(*case.tensors, scale=SCALE, draft=draft) for draft in (True, False))
    assert not torch.equal(draft, both)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_spans_end_inside_of_pages(scheme: str) -> None:
    """Split over many programs, some of which have quantized pages only, some tail pages only, and some both."""
    case = _float32(make_quantized(scheme, [700, 130, 3], [8, 1, 2], Heads(1, 2), 32))
    out, scores = torch.full_like(case.batch.query, float("nan")), ScoreParams.of(SCALE, 0, 0.0)
    config = {"rows": 16, "tokens": 64, "warps": 4, "stages": 2, "splits": 6}
    paged_decode(AttentionArgs(*case.tensors, None, out, scores), 8, config)
    wanted = reference.paged_attention(case.batch.query.double(), *case.tensors[1:], scale=SCALE)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-5)


def test_padding_is_zero() -> None:
    for scheme in SCHEMES:
        case = _float32(make_quantized(scheme, [40, 30], [1, 1], Heads()))
        lengths = torch.tensor([40, 0], dtype=torch.int32, device=DEVICE)
        out = paged_attention(*case.tensors[:-1], lengths, scale=SCALE)
        assert bool(out[0].all())
        assert not out[1].any()


@pytest.mark.parametrize("heads", [Heads(1, 1, 64, 64), Heads(3, 1, 24, 40), Heads(5, 1, 2, 6)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_writes_what_the_oracle_writes(scheme: str, heads: Heads) -> None:
    """Equal to the bit under the interpreter, which divides exactly. A GPU's quotient may be off by one unit in the last
    place, which may give the neighbouring code."""
    case = make_quantized(scheme, [35, 16], [1, 1], heads)
    slots = slots_of(case.batch)
    tokens = [cache.flatten(0, 1)[slots] * 3 for cache in (case.batch.key_cache, case.batch.value_cache)]
    tokens[0][:9], tokens[1][7:20] = 2.5, 1e-9
    tokens = [new.half().float() for new in tokens] if scheme != "int8" else tokens
    stores = [_float32(case).keys, _float32(case).values]
    found, wanted = ([empty_like(store) for store in stores] for _ in range(2))
    for part in torch.arange(len(slots)).split(13):
        where = torch.cat([torch.tensor([-1], device=DEVICE), slots[part]])
        key, value = (torch.cat([torch.full_like(new[:1], 7e4), new[part]]) for new in tokens)
        kv_write(key, value, found[0], found[1], where)
        reference.kv_write(key, value, wanted[0], wanted[1], where)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.params.view(torch.int16), other.params.view(torch.int16))
        for name in ("codes", "lower", "tail_pages"):
            left, right = getattr(one, name), getattr(other, name)
            if DEVICE == "cpu":
                assert left is right is None or torch.equal(left.view(torch.uint8), right.view(torch.uint8)), name


@pytest.mark.parametrize("counts", [[1, 1], [21, 9]])
def test_float8(counts: list[int]) -> None:
    """Written like the reference, including ties, subnormals and numbers out of range; then read by attention."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(160, 2, 24, generator=generator) * torch.logspace(-4, 3, 160)[:, None, None]
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    ties = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([449.0, 1e9, -1e9])])
    rows.flatten()[: len(ties)] = ties
    rows = rows.to(DEVICE)
    slots = torch.arange(160, device=DEVICE)
    found, wanted = (torch.zeros(10, 16, 2, 24, dtype=torch.float8_e4m3fn, device=DEVICE) for _ in range(2))
    kv_write(rows, rows, found, found.clone(), slots)
    reference.kv_write(rows, rows, wanted, wanted.clone(), slots)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    query = torch.randn(sum(counts), 4, 24, generator=generator).to(DEVICE)
    table = torch.randperm(10, generator=generator).int().view(2, 5).to(DEVICE)
    batch = table, torch.tensor([0, *counts], device=DEVICE).cumsum(0).int(), torch.tensor([77, 40], device=DEVICE).int()
    out = paged_attention(query, found, found, *batch, scale=0.001)
    exact = reference.paged_attention(query.double(), found, found, *batch, scale=0.001)
    # Values reach 448, and their weights are off by about 1e-6.
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-3)
