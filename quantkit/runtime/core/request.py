"""A request: a prompt, and how to sample what follows it."""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property

from quantkit.errors import RequestError
from quantkit.runtime.core.constraint import Constraint

#: Below the minimum, dividing by the temperature overflows float32: such a request is greedy. Near the maximum, all tokens are
#: equally likely; a request above it is refused, because the temperature itself would overflow at some point.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-5, 1e6

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Names and meanings are vLLM's; the defaults leave the model's distribution unchanged.

    Attributes:
        max_tokens: largest number of output tokens; None: as many as context and KV memory hold.
        n: number of samples of the same prompt.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens, of equal ones those with lower ids; 0: all.
        top_p: then keep the smallest set of most likely tokens with at least the share p of what top-k left; 1: all.
        min_p: then drop tokens less likely than min_p times the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output.
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted once per occurrence in the output.
        seed: the same seed gives the same samples, whatever else is in the batch and whatever proposer drafts; None: random.
        stop: strings that end the output.
        stop_token_ids: tokens that end the output, in addition to the model's end-of-sequence tokens.
        include_stop: whether the text includes the stop string or the stop token's text. Token ids always include it.
        ignore_eos: do not stop at the model's end-of-sequence tokens.
        logprobs: return log probabilities of each chosen token and of this many most likely ones; None: do not.
        prompt_logprobs: the same for the tokens of the prompt; the first one never has a log probability.
        prompt_logprobs_from: the first prompt token that gets one; those before it may come from the prefix cache.

    Raises:
        RequestError: a value is outside of its range.
    """

    max_tokens: int | None = 16
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1

    def __post_init__(self) -> None:
        # NaN makes every comparison false, so it is refused, too.
        rules = {
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            "n": (self.n >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= MAX_TEMPERATURE, f"between 0 (greedy) and {MAX_TEMPERATURE:g}"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0; 1 turns it off"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "between -2 and 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            "stop": (all(self.stop), "strings that are not empty"),
            "logprobs": (0 <= (self.logprobs or 0) <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
            "prompt_logprobs": (0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
            "prompt_logprobs_from": (self.prompt_logprobs_from >= 1, "at least 1"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)!r:.40}, it must be {wanted}")

    @cached_property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a random draw."""
        return self.temperature < MIN_TEMPERATURE

    @cached_property
    def filtered(self) -> bool:
        """Whether top-k, top-p or min-p may drop tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @cached_property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def argmax_only(self) -> bool:
        """Whether sampling is just an argmax of the model's own logits."""
        return self.greedy and not self.penalised and self.logprobs is None


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: token ids.
        params: how to sample.
        constraint: what every sample must look like, from its first token on. It is copied for each sample and never
            advanced itself. None: no constraint.
    """

    prompt: SequenceOf[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    constraint: Constraint | None = None
