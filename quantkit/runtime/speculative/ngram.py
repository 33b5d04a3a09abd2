"""Prompt lookup: what followed the last time that the text went like this (Saxena, "Prompt Lookup Decoding", 2023)."""

from array import array
from collections.abc import Sequence as SequenceOf

from quantkit.runtime.core.sequence import Draft, Sequence

#: Tokens that must agree, at most and at least.
LONGEST, SHORTEST = 4, 2


class Index:
    """Where each run of tokens occurred last in a text that only grows.

    Adding a token costs a few dictionary entries, and a look-up as many, however long the text is.
    """

    def __init__(self) -> None:
        #: n -> the bytes of n tokens -> position behind their last occurrence, the end of the text excepted.
        self._ends: dict[int, dict[bytes, int]] = {n: {} for n in range(LONGEST, SHORTEST - 1, -1)}
        self._length = 0

    def follow(self, tokens: "array[int]", count: int) -> list[int]:
        """The next `count` tokens if the text goes on as it did behind the latest occurrence of its longest known end.

        A text that repeats a period shorter than `count` is taken to go on repeating it.

        Args:
            tokens: int64, the text; what was there at the last call is unchanged.
            count: at least 1.

        Returns:
            `count` tokens; none where no end of the text occurred before.
        """
        end = len(tokens)
        for stop in range(self._length, end):
            for n, ends in self._ends.items():
                if stop >= n:
                    ends[tokens[stop - n : stop].tobytes()] = stop
        self._length = end
        for n, ends in self._ends.items():
            start = ends.get(tokens[end - n :].tobytes()) if end > n else None
            if start is not None:
                return [tokens[start + i % (end - start)] for i in range(count)]
        return []


class NgramProposer:
    """Drafts from each sequence's own text; implements `Proposer`."""

    def __init__(self) -> None:
        self._indexes: dict[Sequence, Index] = {}

    def propose(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[Draft]:
        """See `Proposer`."""
        return [
            Draft(self._indexes.setdefault(sequence, Index()).follow(sequence.tokens, count)) for sequence, count in wanted
        ]

    def accepted(self, sequence: Sequence, count: int) -> None:
        """Nothing to do: the tokens are read when the next draft is wanted."""

    def backlog(self, sequence: Sequence) -> int:
        """None: reading a token costs next to nothing."""
        return 0

    def released(self, sequence: Sequence) -> None:
        """Drop its index."""
        self._indexes.pop(sequence, None)
