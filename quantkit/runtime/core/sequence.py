"""The state of one running sequence (one sample of a request), and its part in a step.

A request with `n` samples becomes `n` sequences. Tokens are stored in `array`s: batch tensors are views of that memory, so
no step converts a list that grows with the context.
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
from quantkit.runtime.core.output import Timing, TokenLogprobs, Usage
from quantkit.runtime.core.request import SamplingParams
from quantkit.runtime.core.token_history import TokenHistory


class Status(Enum):
    """Where a sequence is.

    NEW: in no queue yet; its first sibling still computes the prompt that they share. WAITING, RUNNING: in one of the
    scheduler's two queues. FINISHED: in no queue any more.
    """

    NEW = auto()
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sample(NamedTuple):
    """A chosen token."""

    token: int
    logprobs: TokenLogprobs | None = None


class Draft(NamedTuple):
    """Tokens that may follow a sequence. They do not belong to the sequence until they are accepted.

    Attributes:
        tokens: the k draft tokens, in order; a draft may be empty.
        probabilities: float32 [k, V], the distribution that each token was drawn from; None if the proposer is deterministic:
            it would propose the same tokens again.
    """

    tokens: SequenceOf[int] = ()
    probabilities: Tensor | None = None


@dataclass(eq=False)
class Sequence:
    """One sample of a request.

    Attributes:
        request_id: increases with arrival.
        index: which of the request's samples.
        params: how to sample it.
        tokens: prompt and output, int64.
        num_prompt: number of prompt tokens among them.
        limit: length in tokens at which it ends.
        stop_tokens: token ids that end it.
        text: turns its tokens into text.
        random: its own source of uniform numbers, so that no other request influences it. Each token takes one number;
            a proposer that draws its tokens without a seed takes more.
        timing: see `Timing`.
        constraint: what its output must look like; has been advanced by every output token. None: no constraint.
        forks: the request's other samples; they split off when the prompt is computed.
        status: see `Status`.
        num_computed: leading tokens whose keys and values were computed; also the position of the next one.
        blocks: int32, the physical blocks that it holds, in the order of their tokens. Like the six attributes that follow,
            it is owned by the block manager.
        num_published: leading blocks that the prefix cache knows.
        chain: the prefix cache's node for the last of these.
        num_evicted: computed tokens that are no longer held. Kernels count tokens without these: see `num_held`.
        evicted: ascending numbers of the logical blocks that these tokens filled.
        scores: attention mass that each held block had collected when blocks were last dropped; only for policies that use it.
        mass: attention that the token that filled the budget pays to each block.
        num_cached: prompt tokens found in the prefix cache; None before it was first admitted.
        history: token counts for the penalties; owned by the sampler.
        next_prompt_logprob: index of the first prompt token whose log probability is still to be computed; `num_prompt` if
            none is.
        prompt_logprobs: log probabilities that were computed but not handed out yet.
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
    history: TokenHistory = field(default_factory=TokenHistory)
    next_prompt_logprob: int = field(init=False)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        wanted = self.params.prompt_logprobs is not None
        self.next_prompt_logprob = min(self.params.prompt_logprobs_from, self.num_prompt) if wanted else self.num_prompt

    @property
    def order(self) -> tuple[int, int]:
        """Sort key for the order of arrival, oldest first."""
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
        """For each entry of `blocks`, the number of the block of the text that it holds."""
        dropped = set(self.evicted)
        return [i for i in range(len(self.blocks) + len(dropped)) if i not in dropped]

    @property
    def is_decoding(self) -> bool:
        """Whether only its newest token is left to compute, so that drafts may follow."""
        return self.num_pending == 1 and len(self.tokens) > self.num_prompt

    @property
    def num_reusable(self) -> int:
        """Leading tokens that need no computation if their keys and values are cached; the others' logits are needed."""
        return (len(self.tokens) if self.next_prompt_logprob == self.num_prompt else self.next_prompt_logprob) - 1

    @property
    def num_slots(self) -> int:
        """Batch slots that it takes: itself and the samples that will split off."""
        return 1 + len(self.forks)

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        return Usage(self.num_prompt, self.num_cached or 0, len(self.tokens) - self.num_prompt)


class Scheduled(NamedTuple):
    """A sequence's part in a step.

    Attributes:
        sequence: which one.
        num_tokens: the tokens to compute: the sequence's next ones, then those of the draft.
        num_logits: how many of the last tokens need logits to choose what follows: each draft token and the one before it.
            0 for a chunk that does not reach the end of the known tokens.
        draft: tokens that the sequence does not have yet.
        num_prompt_logits: how many tokens before these need logits because the next prompt token wants its log probability.
    """

    sequence: Sequence
    num_tokens: int
    num_logits: int
    draft: Draft = Draft()
    num_prompt_logits: int = 0
