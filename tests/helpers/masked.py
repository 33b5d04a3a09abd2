"""transformers' own attention with a mask of the keys that eviction has left for each position."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


def sliding(seen: Tensor, window: int) -> Tensor:
    """What a layer with a sliding window sees of bool [T, T]."""
    places = torch.arange(len(seen))
    return seen & (places > places[:, None] - window)


def masked_forward(folder: Path, tokens: list[int], seen: Tensor, window: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A model's logits and attention where query p sees exactly the keys of row p.

    Args:
        folder: of the model.
        tokens: T ids.
        seen: bool [T, T], key position allowed for query position.
        window: of those of the model's layers that have one.

    Returns:
        float64 [T, V], and each layer's attention weights, float64 [Hq, T, T].
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    least = torch.finfo(torch.float64).min

    def bias(allowed: Tensor) -> Tensor:
        return torch.zeros(1, 1, *allowed.shape, dtype=torch.float64).masked_fill(~allowed, least)

    full = bias(seen)
    masks = {"full_attention": full, "sliding_attention": bias(sliding(seen, window))} if window else full
    with torch.no_grad():
        out = model(torch.tensor([tokens]), attention_mask=masks, use_cache=False, output_attentions=True)
    return out.logits[0], [weights[0] for weights in out.attentions]
