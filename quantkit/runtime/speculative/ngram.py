"""Prompt lookup: draft what followed the last time that the same tokens occurred (Saxena, "Prompt Lookup Decoding", 2023)."""

from array import array
from collections.abc import Sequence as SequenceOf

from quantkit.runtime.core.sequence import Draft, Sequence
from quantkit.runtime.model.model_runner import open_model
from quantkit.runtime.speculative.opened_model import OpenedModel
from quantkit.runtime.speculative.proposers import SpecRequest

#: Most and fewest tokens at the end of the text that must have occurred before.
LONGEST, SHORTEST = 4, 2


class Index:
    """Where each n-gram occurred last in a text that only grows.

    Adding a token and looking up a draft each cost a few dictionary operations, however long the text is.
    """

    def __init__(self) -> None:
        #: n -> the bytes of n tokens -> position after their last occurrence, except at the end of the text.
        self._ends: dict[int, dict[bytes, int]] = {n: {} for n in range(LONGEST, SHORTEST - 1, -1)}
        self._length = 0

    def follow(self, tokens: "array[int]", count: int) -> list[int]:
        """The next `count` tokens if the text continues as it did after the latest occurrence of its longest known suffix.

        A text that repeats with a period shorter than `count` is expected to keep repeating.

        Args:
            tokens: int64, the text; the tokens of the last call must be unchanged.
            count: at least 1.

        Returns:
            `count` tokens; none if no suffix of the text occurred before.
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
        """Do nothing: tokens are indexed when the next draft is wanted."""

    def backlog(self, sequence: Sequence) -> int:
        """0, because indexing a token costs next to nothing."""
        return 0

    def released(self, sequence: Sequence) -> None:
        """Drop the index of a sequence."""
        self._indexes.pop(sequence, None)


def open_ngram(request: SpecRequest) -> OpenedModel:
    """Load a model that any text can be drafted for.

    Raises:
        QuantkitError: the model cannot be loaded, or the cache is too small.
    """
    return OpenedModel(open_model(request.folder, request.device, request.cache), NgramProposer)
