"""Causal attention in slices against torch's own, whole."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from quantkit.models.causal_attention import attend


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_slices_give_what_the_whole_gives(length: int, heads: int, kv_heads: int) -> None:
    torch.manual_seed(length)
    query = torch.randn(2, heads, length, 24, dtype=torch.float64)
    key, value = torch.randn(2, 2, kv_heads, length, 24, dtype=torch.float64)
    whole = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    sliced, _ = attend(nn.Module(), query, key, value, None, scaling=0.3)
    torch.testing.assert_close(sliced, whole.transpose(1, 2), rtol=0, atol=1e-12)  # the order of float64 sums differs


def test_a_mask_is_obeyed() -> None:
    """A window of two tokens, and a first token that sees itself only."""
    query, key, value = torch.randn(3, 1, 2, 6, 8, dtype=torch.float64)
    rows = torch.arange(6)
    mask = (rows[:, None] >= rows) & (rows[:, None] - rows < 2)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    found, _ = attend(nn.Module(), query, key, value, mask[None, None])
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=1e-12)
