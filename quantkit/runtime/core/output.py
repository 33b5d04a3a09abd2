"""The results that the engine hands out: one `Output` per sequence and step, with token counts and times."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple


class FinishReason(str, Enum):
    """Why a sequence ended.

    STOP: a stop string, a stop token, an end-of-sequence token, or a complete constraint. LENGTH: the token limit.
    CANCELLED: the caller cancelled the request. ERROR: a step failed.
    """

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class TokenLogprobs(NamedTuple):
    """Natural log probabilities under the model's own distribution: before penalties, temperature and filters, as in vLLM.

    Attributes:
        token: the chosen token.
        logprob: its log probability.
        top: the most likely tokens and their log probabilities, best first; the chosen token may be missing from it.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Usage(NamedTuple):
    """Token counts of a sequence: the prompt, the part of it found in the prefix cache, and the tokens generated so far."""

    prompt: int
    cached: int
    generated: int


class Timing(NamedTuple):
    """Seconds of `time.monotonic()` at which the request was added, first ran, got its first token, and ended."""

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass
class Output:
    """What one step added to a sequence. The last output of a sequence, and no other, has a finish reason.

    Attributes:
        request_id: the id that `Engine.add` returned.
        index: which of the request's samples.
        usage: counts so far.
        timing: times so far.
        text: new text; may be empty while a character or a possible stop string is incomplete.
        token_ids: new tokens, including the one that ended the sequence.
        logprobs: one entry per token id, if the request asked for them.
        finish_reason: see `FinishReason`.
        stop: the stop string or the stop token that ended the sequence.
        error: the exception that ended the sequence, if a step failed.
        prompt_logprobs: one entry per prompt token, if the request asked for them; comes with the first output.
    """

    request_id: int
    index: int
    usage: Usage
    timing: Timing
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    error: Exception | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


def merge_outputs(outputs: SequenceOf[Output]) -> Output:
    """Concatenate all outputs of one sequence, in order, into one."""
    return replace(
        outputs[-1],
        text="".join(output.text for output in outputs),
        token_ids=[token for output in outputs for token in output.token_ids],
        logprobs=[each for output in outputs for each in output.logprobs],
        prompt_logprobs=[each for output in outputs for each in output.prompt_logprobs],
    )
