"""Counts of the tokens that a sequence has so far, in the form that the penalties need."""

from array import array


class TokenHistory:
    """The distinct tokens of a sequence and how often its output contains each.

    Attributes:
        ids: int64, every distinct token of prompt and output.
        counts: float32, how often each occurs in the output.
    """

    def __init__(self) -> None:
        self.ids = array("q")
        self.counts = array("f")
        self._places: dict[int, int] = {}
        self._length = 0

    def update(self, tokens: "array[int]", num_prompt: int) -> None:
        """Add the tokens that are new since the last call; a sequence only ever grows."""
        for i in range(self._length, len(tokens)):
            self._add(tokens[i], i >= num_prompt)
        self._length = len(tokens)

    def count(self, token: int) -> float:
        """How often the output contains a token."""
        place = self._places.get(token)
        return 0.0 if place is None else self.counts[place]

    def _add(self, token: int, in_output: bool) -> None:
        place = self._places.setdefault(token, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token)
            self.counts.append(0)
        self.counts[place] += in_output
