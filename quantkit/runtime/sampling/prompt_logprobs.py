"""Log probabilities of a prompt's own tokens, collected chunk by chunk as the prompt is computed."""

from collections.abc import Container
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from quantkit.runtime.core.output import TokenLogprobs
from quantkit.runtime.core.sequence import Scheduled
from quantkit.runtime.sampling.logits import top_logprobs


@torch.inference_mode()
def append_prompt_logprobs(logits: Tensor, scheduled: SequenceOf[Scheduled], failed: Container[int]) -> None:
    """Append to each sequence's `prompt_logprobs` what this step computed.

    Args:
        logits: float32 [R, V], all rows of the step; those of one sequence start with its `num_prompt_logits`.
        scheduled: the step.
        failed: ids of requests to leave out.
    """
    first = 0
    for sequence, _, num_logits, _, num_prompt_logits in scheduled:
        if num_prompt_logits and sequence.request_id not in failed:
            start = sequence.next_prompt_logprob
            tokens = sequence.tokens[start : start + num_prompt_logits].tolist()
            counts = [sequence.params.prompt_logprobs or 0] * num_prompt_logits
            found = top_logprobs(logits[first : first + num_prompt_logits], tokens, counts)
            sequence.prompt_logprobs += [TokenLogprobs(token, *each) for token, each in zip(tokens, found, strict=True)]
            sequence.next_prompt_logprob += num_prompt_logits
        first += num_prompt_logits + num_logits
