"""What steps cost on this machine: running medians of measured times, so that one slow step changes nothing.

The first time of everything is not counted: kernels may be compiled in it, or graphs captured.
"""

from bisect import bisect_left, insort
from collections import deque
from statistics import median

#: Times that a median is taken of.
_WINDOW = 7

#: Where only one number of rows was timed yet: what twice as many rows are taken to cost more, as a share.
_GUESSED_SLOPE = 0.3

#: A row beyond the most that were timed is taken to cost this share of what the last ones did: longer drafts are tried rather
#: than never timed.
_HOPE = 0.5

#: Steps from which on their cost is taken for known.
_FEWEST = 3

#: A draft's backlog of up to this many tokens a sequence is the ordinary one, and part of a draft step's cost.
ORDINARY_BACKLOG = 2


class Curve:
    """Seconds by a count: linear between the counts that were timed, less steep beyond.

    Attributes:
        samples: times that were counted.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._times: dict[int, deque[float]] = {}
        #: Counts with a time, ascending, and the median of each.
        self._counts: list[int] = []
        self._medians: dict[int, float] = {}

    def note(self, count: int, seconds: float) -> None:
        """Add a time."""
        if count not in self._times:
            self._times[count] = deque(maxlen=_WINDOW)
            return
        if count not in self._medians:
            insort(self._counts, count)
        self._times[count].append(seconds)
        self._medians[count] = median(self._times[count])
        self.samples += 1

    def is_timed(self, count: int) -> bool:
        """Whether that count was timed."""
        return count in self._medians

    def at(self, count: int) -> float:
        """Seconds; something must have been timed."""
        known = self._counts
        if len(known) == 1:
            (only,) = known
            return self._medians[only] * (1 + _GUESSED_SLOPE * max(count - only, 0) / only)
        place = min(max(bisect_left(known, count), 1), len(known) - 1)
        low, high = known[place - 1], known[place]
        below, above = self._medians[low], self._medians[high]
        # More does not cost less, whatever the noise; nor is the line followed to nothing where little is asked about.
        slope = (above - below) / (high - low)
        guess = below + slope * (min(count, high) - low) + _HOPE * slope * max(count - high, 0)
        return max(guess, below if count > low else 0.25 * below)


class Costs:
    """Seconds of a forward with verification by its rows, of a draft step by its sequences, and of a token of backlog.

    Attributes:
        steps: over newest tokens and drafts, verification included, by rows.
        drafts: of one token more for every sequence that drafts, by these.
    """

    def __init__(self) -> None:
        self.steps, self.drafts = Curve(), Curve()
        self._backlog: deque[float] = deque(maxlen=_WINDOW)
        self._prompt: deque[float] = deque(maxlen=_WINDOW)

    def note_prompt(self, rows: int, seconds: float) -> None:
        """Add a forward over `rows` tokens, most of them of prompts."""
        self._prompt.append(seconds / rows)

    def note_draft(self, sequences: int, longest: int, backlog: int, seconds: float) -> None:
        """Add a round of proposals, the longest of `longest` tokens, that had `backlog` tokens beyond the ordinary to do."""
        if backlog == 0:
            self.drafts.note(sequences, seconds / longest)
        else:
            self._backlog.append(max(seconds - longest * self.draft_step(sequences), 0.0) / backlog)

    def step(self, rows: int) -> float | None:
        """Seconds of a forward over `rows` tokens; None before three steps were timed."""
        return self.steps.at(rows) if self.steps.samples >= _FEWEST else None

    def draft_step(self, sequences: int) -> float:
        """Seconds of one token more in a round of drafts; 0 while unknown."""
        return self.drafts.at(sequences) if self.drafts.samples else 0.0

    def backlog(self, tokens: int, plain: float) -> float:
        """Seconds that `tokens` tokens of backlog take; `plain`: of a step without drafts.

        While unknown, as many as the model itself needs for a prompt's; while that is unknown, each an eighth of a plain step.
        """
        known = self._backlog or self._prompt
        return tokens * (median(known) if known else plain / 8)

    def rounds(self, sequences: int, longest: int) -> list[float]:
        """Seconds of a step in which `sequences` sequences draft 0, 1, ... `longest` tokens each, the drafting included.

        Empty while the cost of a step is unknown.
        """
        if self.step(sequences) is None:
            return []
        drafting = self.draft_step(sequences)
        return [self.steps.at(sequences * (1 + length)) + length * drafting for length in range(longest + 1)]
