"""Causal attention over whole windows, as an attention implementation of transformers.

torch's CPU kernel also multiplies each query with the keys after it, and masks those products. Here queries are cut into
slices, and each slice is multiplied with the keys up to its own end only: for a window of 512 tokens that is 5/8 of the work.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: The name under which transformers knows the implementation.
NAME = "quantkit_causal"

_SLICE = 128


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling * Q K^T) V, where token t sees tokens 0..t, or the tokens that the mask allows.

    Args:
        module: the attention layer.
        query: [B, Hq, T, D].
        key, value: [B, Hkv, T, D].
        attention_mask: None: causal. Otherwise as for `sdpa`, which is then called instead.
        scaling: None: D ** -0.5.
        kwargs: passed on to `sdpa`.

    Returns:
        [B, T, Hq, D] and no attention weights.
    """
    if attention_mask is not None or query.device.type != "cpu":
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    parts = []
    for start, part in zip(range(0, query.shape[2], _SLICE), query.split(_SLICE, dim=2), strict=True):
        stop = start + part.shape[2]
        seen = torch.ones(part.shape[2], stop, dtype=torch.bool, device=query.device).tril(start)
        parts.append(scaled_dot_product_attention(part, key[:, :, :stop], value[:, :, :stop], seen, scale=scaling))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def register() -> str:
    """Register the implementation with transformers, with the same masks as `sdpa`. Returns its name."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
