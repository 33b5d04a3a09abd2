"""The interface of draft proposers. A bad proposer costs time and nothing else: the text is always the target model's own."""

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from quantkit.runtime.core.sequence import Draft, Sequence


class Proposer(Protocol):
    """Guesses the tokens that follow running sequences.

    A round is a call of `propose`, then the target's forward, then `accepted` for each sequence whose draft was not empty, and
    `released` for those that end. If the step fails, `released` is called without `accepted`.

    A proposer may keep any state for a sequence until `released`; sequences are hashed by identity. It may read a sequence's
    tokens, but never change the sequence. It may write to the target's KV cache only in the slots after the `num_computed`
    computed tokens, and to no more slots than the longest draft asked for and one. These slots belong to the sequence alone,
    and the forward that verifies the draft overwrites them up to the draft's end.
    """

    def propose(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[Draft]:
        """A draft for each sequence, of at most the given number of tokens (at least 1). Drafts may be shorter or empty.

        All tokens of each sequence but the last are in the target's KV cache. A proposer that draws tokens must take its
        random numbers from `sequence.random` and return the distribution. For a greedy sequence nothing is drawn.
        """
        ...

    def accepted(self, sequence: Sequence, count: int) -> None:
        """The first `count` tokens of the sequence's last draft were accepted.

        They are part of its tokens now and, unless the sequence ends, so is one token after them.
        """
        ...

    def backlog(self, sequence: Sequence) -> int:
        """Tokens that the next `propose` must compute for this sequence before it can draft; 0 if that costs nothing."""
        ...

    def released(self, sequence: Sequence) -> None:
        """Forget a sequence, known or not: it has ended or was preempted. A preempted one comes back like a new one."""
        ...
