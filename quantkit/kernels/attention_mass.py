"""How much attention a query pays to each block of its sequence: what score-based eviction goes by.

    mass[b] = sum over heads h and keys k in block b of softmax_k(scale * q_h . k_h)

Plain torch on every device: it runs for one query of a sequence and once in a stride of evicted blocks, so it costs less
than a step in a hundred. The attention kernels keep no weights, so these are computed a second time.
"""

import torch
from torch import Tensor

from quantkit.kernels.layouts.kv_codec import stored
from quantkit.kernels.layouts.quantized_kv import Cache


def attention_mass(
    query: Tensor,
    key_cache: Cache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every sequence's newest token, summed over heads and over the keys of a block.

    Args:
        query: floating [S, Hq, D]; Hq is a multiple of Hkv.
        key_cache: [num_blocks, block_size, Hkv, D], plain or quantized; of pages, only full ones count right.
        block_table: int32 [S, B]; what lies behind a sequence's length counts for nothing.
        seq_lens: int32 [S], tokens in the cache, the query's own included; at least 1.
        scale, window, softcap, sinks: as for `reference.paged_attention`.

    Returns:
        [S, B] in float32 (float64 for a float64 query); a row sums to Hq, or less where there are sinks.
    """
    block_size, kv_heads = key_cache.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = stored(key_cache, block_table.long().flatten()).unflatten(0, block_table.shape).flatten(1, 2).to(wide)
    scores = torch.einsum("shgd,slhd->shgl", query.to(wide).unflatten(1, (kv_heads, -1)), keys).flatten(1, 2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    places, lengths = torch.arange(scores.shape[-1], device=query.device), seq_lens[:, None, None]
    hidden = places >= lengths
    if window > 0:
        hidden = hidden | (places < lengths - window)
    # Behind a sequence's length lies anything, NaN too.
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[None, :, None].expand(len(scores), -1, 1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(places)].sum(1)
    mass: Tensor = weights.unflatten(-1, (-1, block_size)).sum(-1)
    return mass
