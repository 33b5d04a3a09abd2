"""Greedy requests of many lengths for tiny models."""

import torch

from helpers import tiny
from quantkit.runtime.core.request import SamplingParams

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


PROMPTS = [
    torch.randint(3, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 7, 16, 33, 90, 150)
]
