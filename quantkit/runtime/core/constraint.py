"""What a text must be like, told as the tokens that may come next.

A constraint follows one sequence: it is advanced by every token that the sequence has for good, so it needs no word about
preemption, and it is asked about drafts without being changed by them. What the sampler does with it stands in `sampler`.
"""

from collections.abc import Sequence
from typing import Protocol


class Constraint(Protocol):
    """Where a text stands in what it must become.

    Attributes:
        finished: the text is complete and nothing but the end may follow, or the end has come.
        error: why it can go on no longer, where it cannot: too complex, say; its text is not to be used. None: it can.
    """

    @property
    def finished(self) -> bool:
        """See the class."""
        ...

    @property
    def error(self) -> str | None:
        """See the class."""
        ...

    def mask(self, ahead: Sequence[int]) -> bytes | None:
        """Tokens that may follow the text and `ahead`, tokens that are no part of it.

        Returns:
            A bit for every token of the vocabulary and no more than 31 others, token 8 b + i in bit i of byte b; the tokens
            that end a text are allowed exactly where it may end, and some token always is. None: `ahead` cannot follow the
            text, or holds its end, so it does not matter what comes behind it.
        """
        ...

    def advance(self, token: int) -> None:
        """The text is longer by a token."""
        ...

    def copy(self) -> "Constraint":
        """Another text's constraint that stands where this one does."""
        ...
