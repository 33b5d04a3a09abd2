"""Causal attention over whole windows, as an attention implementation of transformers.

torch's CPU kernel multiplies each query with the keys behind it, too, and masks the products afterwards. Cut into slices
of queries, each against the keys up to its end, a window of 512 tokens takes 5/8 of those products.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: The implementation's name.
KEY = "quantkit_causal"

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
    """softmax(scaling * Q K^T) V, where token t sees tokens 0..t, or what the mask says.

    Args:
        module: the attention layer.
        query: [B, Hq, T, D].
        key, value: [B, Hkv, T, D].
        attention_mask: None: causal. Else as for `sdpa`, which then does all the work.
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
    """Make the implementation known to transformers, masks as for `sdpa`; returns its name."""
    AttentionInterface.register(KEY, attend)
    AttentionMaskInterface.register(KEY, sdpa_mask)
    return KEY
