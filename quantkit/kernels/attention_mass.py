"""How much attention a query pays to each block of its sequence, which decides what score-based eviction evicts.

    mass[b] = sum over heads h and keys k in block b of softmax_k(scale * q_h . k_h)

Plain torch on every device: it runs for one query per sequence, once per stride of evicted blocks, so it takes less than 1% of
the time of all steps. The attention kernels do not keep their weights, so they are computed again here.
"""

import torch
from torch import Tensor

from quantkit.kernels.layouts.kv_codec import read_blocks
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
    """Attention weights of each sequence's newest token, summed over heads and over the keys of each block.

    Args:
        query: floating [S, Hq, D]; Hq is a multiple of Hkv.
        key_cache: [num_blocks, block_size, Hkv, D], plain or quantized; with tail pages, the mass is right for full blocks
            only.
        block_table: int32 [S, B]; entries past a sequence's length do not count.
        seq_lens: int32 [S], tokens in the cache, the query's own included; at least 1.
        scale, window, softcap, sinks: as for `reference.paged_attention`.

    Returns:
        [S, B] in float32 (float64 for a float64 query); a row sums to Hq, or less where there are sinks.
    """
    block_size, kv_heads = key_cache.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = read_blocks(key_cache, block_table.long().flatten()).unflatten(0, block_table.shape).flatten(1, 2).to(wide)
    scores = torch.einsum("shgd,slhd->shgl", query.to(wide).unflatten(1, (kv_heads, -1)), keys).flatten(1, 2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    positions, lengths = torch.arange(scores.shape[-1], device=query.device), seq_lens[:, None, None]
    hidden = positions >= lengths
    if window > 0:
        hidden = hidden | (positions < lengths - window)
    # Past a sequence's length there may be anything, even NaN.
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[None, :, None].expand(len(scores), -1, 1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(positions)].sum(1)
    mass: Tensor = weights.unflatten(-1, (-1, block_size)).sum(-1)
    return mass
