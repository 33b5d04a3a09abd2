"""What proposes drafts. Whatever it proposes, the text is the model's own: a bad proposer costs time and nothing else."""

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from quantkit.runtime.core.sequence import Draft, Sequence


class Proposer(Protocol):
    """Guesses the tokens that follow running sequences.

    A round is `propose`, then the model's forward, then `accepted` for each sequence whose draft was not empty, and `released`
    for those that end with it. Where the step fails, `released` comes without `accepted`.

    A proposer may keep what it likes for a sequence (it is hashed by identity) until `released`, and reads its tokens, never
    changes it. It may write to the target's KV cache only in the slots behind `num_computed` computed tokens, as many as the
    longest draft asked for and one more: these belong to the sequence alone, and the forward that verifies overwrites them
    up to the end of the draft.
    """

    def propose(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[Draft]:
        """A draft for each sequence, of at most as many tokens as given (at least 1); shorter or empty where it has none.

        All tokens of each sequence but the last are in the target's KV cache. Whoever draws tokens takes the random numbers
        from `sequence.random` and returns the distribution; for a greedy sequence nothing is drawn.
        """
        ...

    def accepted(self, sequence: Sequence, count: int) -> None:
        """The first `count` tokens of the sequence's last draft are in its tokens now; unless it ends, so is one more."""
        ...

    def backlog(self, sequence: Sequence) -> int:
        """Tokens that the next `propose` must work through for this sequence before it can draft; 0 where it costs nothing."""
        ...

    def released(self, sequence: Sequence) -> None:
        """Forget a sequence, known or not: it has ended or was preempted. One that was preempted comes back as if new."""
        ...
