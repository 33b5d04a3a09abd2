"""Quantized caches on the CPU: the native codes equal the reference's to the bit, and attention agrees up to rounding."""

import pytest
import torch

from helpers.native_cases import kernels, threads  # noqa: F401
from helpers.paged_samples import Heads
from helpers.quantized_samples import SCALE, SCHEMES, assert_right, empty_like, make_quantized, slots_of
from quantkit.kernels import reference
from quantkit.kernels.cpu import attention as cpu_attention

STEPS = {"decode": [1, 1], "verify": [3, 8], "prefill": [33, 60], "mixed": [21, 1]}

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_steps(scheme: str, step: str) -> None:
    assert_right(cpu_attention.paged_attention, make_quantized(scheme, [300, 70], STEPS[step], Heads()))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 129])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_lengths_at_the_edges_of_pages_and_chunks(scheme: str, length: int) -> None:
    assert_right(
        cpu_attention.paged_attention, make_quantized(scheme, [length, length, 40], [1, min(length, 9), 40], Heads(1, 2))
    )


@pytest.mark.parametrize("block_size", [2, 4, 32, 128])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_block_sizes(scheme: str, block_size: int) -> None:
    assert_right(cpu_attention.paged_attention, make_quantized(scheme, [190, 70], [33, 1], Heads(), block_size))
    assert_right(cpu_attention.paged_attention, make_quantized(scheme, [190, 70], [5, 3], Heads(), block_size))


@pytest.mark.parametrize(
    "heads",
    [Heads(1, 2, 128, 192), Heads(3, 3, 64, 32), Heads(2, 4, 80, 48), Heads(1, 30, 20, 36), Heads(5, 1, 2, 6)],
    ids=str,
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_heads(scheme: str, heads: Heads) -> None:
    assert_right(cpu_attention.paged_attention, make_quantized(scheme, [140, 75, 20], [1, 30, 2], heads))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_windows_softcap_and_sinks(scheme: str, step: str) -> None:
    case = make_quantized(scheme, [200, 70], STEPS[step], Heads())
    for window in (1, 16, 65):
        assert_right(cpu_attention.paged_attention, case, window=window)
    assert_right(cpu_attention.paged_attention, case, softcap=5.0, window=40, sinks=torch.linspace(-2, 30, 4))


@pytest.mark.parametrize("step", STEPS)
def test_a_draft_reads_the_upper_plane(step: str) -> None:
    """A draft on a 4+4-bit cache gives what an int4 cache of the same tokens gives."""
    both, upper = (make_quantized(scheme, [300, 70], STEPS[step], Heads()) for scheme in ("int4+4", "int4"))
    assert_right(cpu_attention.paged_attention, both, draft=True)
    draft, four = (
        cpu_attention.paged_attention(*case.tensors, scale=SCALE, draft=draft)
        for case, draft in ((both, True), (upper, False))
    )
    assert torch.equal(draft, four)
    assert not torch.equal(draft, cpu_attention.paged_attention(*both.tensors, scale=SCALE))


@pytest.mark.parametrize("heads", [Heads(3, 1, 64, 64), Heads(2, 1, 80, 48), Heads(5, 1, 2, 6), Heads(1, 1, 34, 18)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_writes_what_the_oracle_writes(scheme: str, heads: Heads, threads: int) -> None:  # noqa: F811
    """All bytes are equal, with steps that end within pages, and with padding."""
    case = make_quantized(scheme, [70, 16, 33], [1, 1, 1], heads, 8)
    slots = slots_of(case.batch)
    tokens = [cache.flatten(0, 1)[slots] * 3 for cache in (case.batch.key_cache, case.batch.value_cache)]
    tokens[0][:9], tokens[1][7:20] = 2.5, 1e-9  # Pages and rows of equal numbers, and scales that underflow.
    found, wanted = ([empty_like(store) for store in (case.keys, case.values)] for _ in range(2))
    for part in torch.arange(len(slots)).split(13):
        where = torch.cat([torch.tensor([-1]), slots[part]])
        key, value = (torch.cat([torch.full_like(new[:1], 7e4), new[part]]) for new in tokens)
        cpu_attention.kv_write(key, value, found[0], found[1], where)
        reference.kv_write(key, value, wanted[0], wanted[1], where)
    for one, other in zip(found, wanted, strict=True):
        for name in ("codes", "params", "lower", "tail_pages"):
            left, right = getattr(one, name), getattr(other, name)
            assert left is right is None or torch.equal(left.view(torch.uint8), right.view(torch.uint8)), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_query_depends_on_nothing_but_its_text(scheme: str, kernels: str, threads: int) -> None:  # noqa: F811
    """The last tokens of a prompt have the same result, to the bit, with the prompt, alone, and in a batch."""
    if kernels == "torch":
        pytest.skip("torch's products may depend on their shapes")
    case = make_quantized(scheme, [300, 290], [1, 40], Heads(3, 3, 64, 64))
    whole = cpu_attention.paged_attention(*case.tensors, scale=SCALE)
    torch.set_num_threads(1)
    for count in (1, 4, 20):
        query, _, _, table, _, lengths = case.tensors
        starts = torch.tensor([0, count], dtype=torch.int32)
        stores = case.keys, case.values
        few = cpu_attention.paged_attention(query[-count:], *stores, table[1:], starts, lengths[1:], scale=SCALE)
        assert torch.equal(few, whole[-count:])
