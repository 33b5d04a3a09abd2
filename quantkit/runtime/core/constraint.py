"""The protocol of a constraint: it says which tokens may come next in a sequence's output.

A constraint belongs to one sequence. It is advanced only by tokens that the sequence keeps, so preemption does not concern
it, and asking for a mask after draft tokens does not change it. `sampling.sampler` applies the masks.
"""

from collections.abc import Sequence
from typing import Protocol


class Constraint(Protocol):
    """The state of one output text with respect to what it must become.

    Attributes:
        finished: the text is complete, so that only its end may follow, or it has ended.
        error: why no mask can be computed any more, for example because the grammar became too complex; the text must not be
            used then. None: no error.
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
        """The tokens that may follow the text and then `ahead`, draft tokens that are not part of the text.

        Returns:
            One bit per token of the vocabulary, padded by at most 31 bits: token 8 b + i is bit i of byte b. End-of-text
            tokens are allowed exactly where the text may end, and at least one token is always allowed. None if `ahead`
            cannot follow the text or contains its end: then it does not matter what comes after it.
        """
        ...

    def advance(self, token: int) -> None:
        """Append a token to the text."""
        ...

    def copy(self) -> "Constraint":
        """An independent constraint in the same state, for another sequence."""
        ...
