"""What steps cost on this machine: running medians of measured times, so that one slow step changes nothing.

The first step over a number of rows is not counted, nor is the first round of drafts: kernels may be compiled in it, or graphs
captured.
"""

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
        self._has_drafted = False
        self._draft: deque[float] = deque(maxlen=_WINDOW)
        self._backlog: deque[float] = deque(maxlen=_WINDOW)

    def note_step(self, rows: int, seconds: float) -> None:
        """Add a forward over `rows` tokens, all of them newest tokens or drafts."""
        if rows in self._steps:
            self._steps[rows].append(seconds)
        else:
            self._steps[rows] = deque(maxlen=_WINDOW)

    def note_draft(self, longest: int, backlog: int, seconds: float) -> None:
        """Add a round of proposals, the longest of `longest` tokens, that had `backlog` tokens beyond the ordinary to do."""
        if not self._has_drafted:
            self._has_drafted = True
        elif backlog == 0:
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

    def is_timed(self, rows: int) -> bool:
        """Whether a step over that many rows was timed."""
        return bool(self._steps.get(rows))

    def step(self, rows: int) -> float | None:
        """Seconds of a forward over `rows` tokens: linear between the numbers of rows that were timed and beyond them.

        None before three steps were timed.
        """
        known = sorted(each for each, times in self._steps.items() if times)
        if sum(len(self._steps[each]) for each in known) < 3:
            return None
        if len(known) == 1:
            (only,) = known
            return median(self._steps[only]) * (1 + _GUESSED_SLOPE * max(rows - only, 0) / only)
        place = min(max(bisect_left(known, rows), 1), len(known) - 1)
        low, high = known[place - 1], known[place]
        below, above = median(self._steps[low]), median(self._steps[high])
        # No number of rows costs less than nothing, or less than a smaller one that was timed.
        guess = below + (above - below) * (rows - low) / (high - low)
        return max(guess, below if rows > low else 0.25 * below)

    def rounds(self, sequences: int, longest: int) -> list[float]:
        """Seconds of a step in which `sequences` sequences draft 0, 1, ... `longest` tokens each, the drafting included.

        Empty while the cost of a step is unknown.
        """
        steps = (self.step(sequences * (1 + length)) for length in range(longest + 1))
        return [step + length * self.draft_step for length, step in enumerate(steps) if step is not None]
