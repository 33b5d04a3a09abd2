"""What steps cost on this machine: running medians of measured times, so that one slow step changes nothing."""

from bisect import bisect_left
from collections import deque
from statistics import median

#: Times that a median is taken of.
_WINDOW = 7

#: Where only one number of rows was timed yet: what twice as many rows are taken to cost more, as a share.
_GUESSED_SLOPE = 0.3

#: A draft's backlog of up to this many tokens a sequence is the ordinary one, and part of a draft step's cost.
ORDINARY_BACKLOG = 2


class Costs:
    """Seconds of a forward with verification by its rows, of a draft step, and of a token of a drafter's backlog."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[float]] = {}
        self._draft: deque[float] = deque(maxlen=_WINDOW)
        self._backlog: deque[float] = deque(maxlen=_WINDOW)

    def note_step(self, rows: int, seconds: float) -> None:
        """Add a forward over `rows` tokens, all of them newest tokens or drafts."""
        self._steps.setdefault(rows, deque(maxlen=_WINDOW)).append(seconds)

    def note_draft(self, longest: int, backlog: int, seconds: float) -> None:
        """Add a round of proposals, the longest of `longest` tokens, that had `backlog` tokens beyond the ordinary to do."""
        if backlog == 0:
            self._draft.append(seconds / longest)
        else:
            self._backlog.append(max(seconds - longest * self.draft_step, 0.0) / backlog)

    @property
    def draft_step(self) -> float:
        """Seconds of one token more in a round of drafts; 0 while unknown."""
        return median(self._draft) if self._draft else 0.0

    def backlog(self, tokens: int) -> float:
        """Seconds that `tokens` tokens of backlog take. While unknown, each a quarter of a draft step."""
        return tokens * (median(self._backlog) if self._backlog else self.draft_step / 4)

    def step(self, rows: int) -> float | None:
        """Seconds of a forward over `rows` tokens: linear between the numbers of rows that were timed and beyond them.

        None before three steps were timed.
        """
        if sum(map(len, self._steps.values())) < 3:
            return None
        known = sorted(self._steps)
        if len(known) == 1:
            (only,) = known
            return median(self._steps[only]) * (1 + _GUESSED_SLOPE * max(rows - only, 0) / only)
        place = min(max(bisect_left(known, rows), 1), len(known) - 1)
        low, high = known[place - 1], known[place]
        below, above = median(self._steps[low]), median(self._steps[high])
        # No number of rows costs less than nothing, or less than a smaller one that was timed.
        guess = below + (above - below) * (rows - low) / (high - low)
        return max(guess, below if rows > low else 0.25 * below)

    def round(self, sequences: int, length: int) -> float | None:
        """Seconds of a step in which `sequences` sequences have drafts of `length` tokens, the drafting included."""
        verify = self.step(sequences * (1 + length))
        return None if verify is None else verify + length * self.draft_step
