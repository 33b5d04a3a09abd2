"""Log probabilities of a prompt's own tokens, noted chunk by chunk as the prompt is computed."""

from collections.abc import Container
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from quantkit.runtime.core.sequence import Scheduled, TokenLogprobs
from quantkit.runtime.sampling.logits import likeliest


@torch.inference_mode()
def score_prompts(logits: Tensor, scheduled: SequenceOf[Scheduled], failed: Container[int]) -> None:
    """Note what a step says of its prompts.

    Args:
        logits: float32 [R, V] of all rows of the step that need any: in each part first those that score the prompt.
        scheduled: the step.
        failed: requests that are left out.
    """
    first = 0
    for sequence, _, num_logits, _, num_scored in scheduled:
        if num_scored and sequence.request_id not in failed:
            tokens = sequence.tokens[sequence.num_scored : sequence.num_scored + num_scored].tolist()
            counts = [sequence.params.prompt_logprobs or 0] * num_scored
            found = likeliest(logits[first : first + num_scored], tokens, counts)
            sequence.prompt_logprobs += [TokenLogprobs(token, *each) for token, each in zip(tokens, found, strict=True)]
            sequence.num_scored += num_scored
        first += num_scored + num_logits
