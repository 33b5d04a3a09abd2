"""Which tokens a sequence has, counted as penalties need them."""

from array import array


class History:
    """Which tokens a sequence has, as penalties need it.

    Attributes:
        ids: int64, every token of the prompt or the output once.
        counts: float32, how often it is in the output.
    """

    def __init__(self) -> None:
        self.ids, self.counts = array("q"), array("f")
        self._places: dict[int, int] = {}
        self._length = 0

    def update(self, tokens: "array[int]", num_prompt: int) -> None:
        """Add what a sequence has more than at the last call; its tokens only ever grow."""
        for i in range(self._length, len(tokens)):
            self._add(tokens[i], i >= num_prompt)
        self._length = len(tokens)

    def count(self, token: int) -> float:
        """How often a token is in the output."""
        place = self._places.get(token)
        return 0.0 if place is None else self.counts[place]

    def _add(self, token: int, in_output: bool) -> None:
        place = self._places.setdefault(token, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token)
            self.counts.append(0)
        self.counts[place] += in_output
