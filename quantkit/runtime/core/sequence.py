"""What is known about each sample of a request while it runs, and what comes out.

A request of `n` samples is `n` sequences. Tokens are kept in `array`s, so that batch tensors are views of memory and no
step converts a list that grows with the context.
"""

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum, auto
from random import Random
from typing import NamedTuple

from torch import Tensor

from quantkit.runtime.core.constraint import Constraint
from quantkit.runtime.core.detokenize import TextStream
from quantkit.runtime.core.request import SamplingParams
from quantkit.runtime.core.token_history import History


class Status(Enum):
    """Where a sequence is: in no queue yet (a sample whose prompt its first sibling computes), in one of two, or gone."""

    NEW = auto()
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class FinishReason(str, Enum):
    """Why a sequence ended: a stop string, stop token, end-of-sequence token or complete constraint; its length; from outside;
    a failed step."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class TokenLogprobs(NamedTuple):
    """Natural log probabilities under the model's own distribution: before penalties, temperature and filters, as in vLLM.

    `top` has the likeliest tokens and their log probabilities, best first; the chosen token may be missing from it.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Sample(NamedTuple):
    """A chosen token."""

    token: int
    logprobs: TokenLogprobs | None = None


class Draft(NamedTuple):
    """Tokens that may follow a sequence. They are no part of it until they are accepted.

    Attributes:
        tokens: k of them, in order; none is a draft too.
        probabilities: float32 [k, V], the distribution that each was drawn from; None where nothing was drawn: the drafter
            would propose the same tokens again.
    """

    tokens: SequenceOf[int] = ()
    probabilities: Tensor | None = None


class Usage(NamedTuple):
    """Tokens of the prompt, of these found in the prefix cache, and tokens generated so far."""

    prompt: int
    cached: int
    generated: int


class Timing(NamedTuple):
    """Seconds of `time.monotonic()`: when the request was added, first ran, had its first token, and ended."""

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(eq=False)
class Sequence:
    """One sample of a request.

    Attributes:
        request_id: counts up with arrival.
        index: which of the request's samples.
        params: how it is sampled.
        tokens: prompt and output, int64.
        num_prompt: how many of them are the prompt's.
        limit: length at which it ends.
        stop_tokens: token ids that end it.
        text: turns its tokens into text.
        random: its own source of uniform numbers, so that no other request has a say; one a token, unless a drafter that
            draws its tokens without a seed takes more.
        timing: see `Timing`.
        constraint: what its output must be like; it knows all of it. None: anything.
        forks: the request's other samples, until they split off with the first token.
        status: see `Status`.
        num_computed: leading tokens whose keys and values were computed; also the position of the next one.
        blocks: int32, the physical blocks that it holds, in the order of their tokens; owned by `BlockManager`, as are the
            next five.
        num_published: leading blocks that the prefix cache knows.
        chain: node of the prefix cache at which they end.
        num_evicted: computed tokens that are no longer held. What kernels see counts from there: see `num_held`.
        evicted: ascending numbers of the logical blocks that they filled.
        scores: earlier attention mass of each block that was held when blocks were last dropped, where eviction goes by it.
        mass: attention that the token that filled the budget pays to each block.
        num_cached: prompt tokens found in the prefix cache; None before it was first admitted.
        history: what penalties need to know; owned by the sampler.
        num_scored: tokens of the prompt before this one have their log probabilities, or need none.
        prompt_logprobs: those that are known and were not handed out yet.
    """

    request_id: int
    index: int
    params: SamplingParams
    tokens: "array[int]"
    num_prompt: int
    limit: int
    stop_tokens: frozenset[int]
    text: TextStream
    random: Random
    timing: Timing
    constraint: Constraint | None = None
    forks: "list[Sequence]" = field(default_factory=list)
    status: Status = Status.NEW
    num_computed: int = 0
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    num_published: int = 0
    chain: int = 0
    num_evicted: int = 0
    evicted: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    num_cached: int | None = None
    history: History = field(default_factory=History)
    num_scored: int = field(init=False)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        asked = self.params.prompt_logprobs is not None
        self.num_scored = min(self.params.prompt_logprobs_from, self.num_prompt) if asked else self.num_prompt

    @property
    def order(self) -> tuple[int, int]:
        """Arrival order, oldest first."""
        return self.request_id, self.index

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not computed yet: 1 while decoding, more before that."""
        return len(self.tokens) - self.num_computed

    @property
    def num_held(self) -> int:
        """Computed tokens whose keys and values are in the cache."""
        return self.num_computed - self.num_evicted

    @property
    def logical_blocks(self) -> list[int]:
        """Which of its text's blocks each of `blocks` is."""
        dropped = set(self.evicted)
        return [i for i in range(len(self.blocks) + len(dropped)) if i not in dropped]

    @property
    def decodes(self) -> bool:
        """Whether nothing but its newest token is left to compute, so that drafts may follow."""
        return self.num_pending == 1 and len(self.tokens) > self.num_prompt

    @property
    def num_reusable(self) -> int:
        """Leading tokens that need no computing if their keys and values are known: logits behind the others are wanted."""
        return (len(self.tokens) if self.num_scored == self.num_prompt else self.num_scored) - 1

    @property
    def num_slots(self) -> int:
        """Running sequences that it is or will be."""
        return 1 + len(self.forks)

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        return Usage(self.num_prompt, self.num_cached or 0, len(self.tokens) - self.num_prompt)


class Scheduled(NamedTuple):
    """A sequence's part in a step: its next `num_tokens` tokens, the last `num_logits` of which are to be followed.

    The last tokens are those of `draft`, which the sequence does not have: each of them and the one before it need logits.
    So do the `num_scored` tokens before these, because the prompt's tokens that follow them want log probabilities.
    """

    sequence: Sequence
    num_tokens: int
    num_logits: int
    draft: Draft = Draft()
    num_scored: int = 0


@dataclass
class Output:
    """What a step added to a sequence. A sequence's last output, and no other, has a finish reason.

    Attributes:
        request_id: of the request, as `Engine.add` returned it.
        index: which of the request's samples.
        usage: counts so far.
        timing: times so far.
        text: new text; may be empty while a character or a possible stop string is incomplete.
        token_ids: new tokens, among them what ended the sequence.
        logprobs: one an id, where asked for.
        finish_reason: see `FinishReason`.
        stop: the stop string or the token that ended it.
        error: what failed, where a failed step ended it.
        prompt_logprobs: one a token of the prompt, where asked for, beside the first output.
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
