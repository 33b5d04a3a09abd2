"""Writing keys and values to their slots: nothing is computed, so results are exact."""

import pytest
import torch
from torch import Tensor

from helpers.paged_samples import DEVICE
from quantkit.kernels import reference
from quantkit.kernels.gpu.kv.kv_write import kv_write

BLOCKS, BLOCK_SIZE = 5, 8


def _caches(heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A cache filled with numbers that no token has."""
    shape = (BLOCKS, BLOCK_SIZE, heads)
    return tuple(torch.full((*shape, width), 99.0, dtype=dtype, device=DEVICE) for width in (dim, value_dim))  # type: ignore[return-value]


def _slots(tokens: int) -> Tensor:
    """Unordered slots, including the first and the last one; every third is padding."""
    middle = torch.randperm(BLOCKS * BLOCK_SIZE - 2, generator=torch.Generator().manual_seed(tokens)) + 1
    slots = torch.cat([torch.tensor([BLOCKS * BLOCK_SIZE - 1, 0]), middle])[:tokens]
    slots[2::3] = -1
    return slots.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "dim", "value_dim"), [(1, 64, 64), (2, 80, 80), (3, 16, 24), (5, 33, 7), (8, 128, 128), (1, 1, 1)]
)
def test_writes_what_the_oracle_writes(heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    tokens = 13
    key = torch.randn(tokens, heads, dim, device=DEVICE).to(dtype)
    value = torch.randn(tokens, heads, value_dim, device=DEVICE).to(dtype)
    found, wanted = _caches(heads, dim, value_dim, dtype), _caches(heads, dim, value_dim, dtype)
    kv_write(key, value, *found, _slots(tokens))
    reference.kv_write(key, value, *wanted, _slots(tokens))
    for kernels, oracles in zip(found, wanted, strict=True):
        assert torch.equal(kernels, oracles)


@pytest.mark.parametrize("write", [kv_write, reference.kv_write], ids=["kernel", "oracle"])
def test_every_token_lands_in_its_slot_and_nowhere_else(write: object) -> None:
    key, value = torch.randn(13, 2, 16, device=DEVICE), torch.randn(13, 2, 24, device=DEVICE)
    caches, slots = _caches(2, 16, 24, torch.float32), _slots(13)
    write(key, value, *caches, slots)  # type: ignore[operator]
    written = {slot: token for token, slot in enumerate(slots.tolist()) if slot >= 0}
    assert len(written) == 9
    for slot in range(BLOCKS * BLOCK_SIZE):
        for new, cache in zip((key, value), caches, strict=True):
            there = cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE]
            assert torch.equal(there, new[written[slot]] if slot in written else torch.full_like(there, 99.0))


def test_slices_of_a_fused_projection() -> None:
    # [T, (Hq + 2 Hkv) D], the output of a fused projection: 4 query heads, 2 key heads, 2 value heads.
    fused = torch.randn(7, 8, 16, device=DEVICE)
    key, value = fused[:, 4:6], fused[:, 6:]
    found, wanted = _caches(2, 16, 16, torch.float32), _caches(2, 16, 16, torch.float32)
    kv_write(key, value, *found, _slots(7))
    reference.kv_write(key, value, *wanted, _slots(7))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_no_tokens() -> None:
    caches = _caches(2, 16, 16, torch.float32)
    kv_write(torch.empty(0, 2, 16, device=DEVICE), torch.empty(0, 2, 16, device=DEVICE), *caches, _slots(0))
    assert all(bool((cache == 99).all()) for cache in caches)


def test_wrong_arguments_are_refused() -> None:
    key, caches = torch.randn(3, 2, 16, device=DEVICE), _caches(2, 16, 16, torch.float32)
    for bad in (
        (key.half(), key, *caches, _slots(3)),
        (key, key[..., :8], *caches, _slots(3)),
        (key, key, *caches, _slots(4)),
        (key, key, *caches, _slots(3).int()),
        (key, key, caches[0].transpose(0, 1), caches[1], _slots(3)),
    ):
        with pytest.raises(AssertionError):
            kv_write(*bad)
