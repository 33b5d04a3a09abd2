"""From logits to tokens: token masks, penalties, top-k, top-p, log probabilities, JSON grammars.

Imports `core` and the kernels only; it does not know the KV cache.
"""
