"""From logits to tokens: penalties, masks, top-k, top-p, log probabilities, grammars for JSON.

Knows nothing of the KV cache.
"""
