"""What steps cost on this machine: the least of the latest times of their kind.

Whatever else a machine does makes a step slower and never faster, by several times where it does not run at all for 30 ms. A
mean counts that as a step's cost, and so does a median where it befell two of the first three plain steps; drafts would look
cheap beside these, for as long as they keep plain steps from being timed.

The first time of everything is not counted: kernels may be compiled in it, or graphs captured. Of backlog and prompts, which
come in pieces of all sizes, it is a median.
"""

from bisect import bisect_left, insort
from collections import deque
from statistics import median

#: Latest times of a kind that count.
_WINDOW = 7

#: Where only one number of rows was timed yet: what twice as many rows are taken to cost more, as a share.
_GUESSED_SLOPE = 0.3

#: A row beyond the most that were timed is taken to cost this share of what the last ones did: longer drafts are tried rather
#: than never timed.
_HOPE = 0.5

#: Steps from which on their cost is taken for known: that none of these was left alone is unlikely.
_FEWEST = 5

#: A draft's backlog of up to this many tokens a sequence is the ordinary one, and part of a draft step's cost.
ORDINARY_BACKLOG = 2


class LatencyCurve:
    """Seconds by a count: linear between the counts that were timed, less steep beyond.

    Attributes:
        samples: times that were counted.
        changes: how often what it says has changed.
    """

    def __init__(self) -> None:
        self.samples = self.changes = 0
        self._times: dict[int, deque[float]] = {}
        #: Counts with a time, ascending, and the least of each one's.
        self._counts: list[int] = []
        self._least: dict[int, float] = {}

    def record(self, count: int, seconds: float) -> None:
        """Add a time."""
        if count not in self._times:
            self._times[count] = deque(maxlen=_WINDOW)
            return
        if count not in self._least:
            insort(self._counts, count)
        self._times[count].append(seconds)
        least = min(self._times[count])
        self.changes += least != self._least.get(count)
        self._least[count] = least
        self.samples += 1

    def at(self, count: int) -> float:
        """Seconds; something must have been timed."""
        known = self._counts
        if count == known[0]:  # a plain step of all that run, mostly
            return self._least[count]
        if len(known) == 1:
            (only,) = known
            return self._least[only] * (1 + _GUESSED_SLOPE * max(count - only, 0) / only)
        place = min(max(bisect_left(known, count), 1), len(known) - 1)
        low, high = known[place - 1], known[place]
        below, above = self._least[low], self._least[high]
        # More does not cost less, whatever the noise; nor is the line followed to nothing where little is asked about.
        slope = (above - below) / (high - low)
        guess = below + slope * (min(count, high) - low) + _HOPE * slope * max(count - high, 0)
        return max(guess, below if count > low else 0.25 * below)


class CostModel:
    """Seconds of a forward with verification by its rows, of a draft step by its sequences, and of a token of backlog.

    Attributes:
        steps: over newest tokens and drafts, verification included, by rows.
        drafts: of one token more for every sequence that drafts, by these.
    """

    def __init__(self) -> None:
        self.steps, self.drafts = LatencyCurve(), LatencyCurve()
        self._backlog: deque[float] = deque(maxlen=_WINDOW)
        self._prompt: deque[float] = deque(maxlen=_WINDOW)

    def record_prompt(self, rows: int, seconds: float) -> None:
        """Add a forward over `rows` tokens, most of them of prompts."""
        self._prompt.append(seconds / rows)

    def record_drafting(self, sequences: int, longest: int, backlog: int, seconds: float) -> None:
        """Add a round of proposals, the longest of `longest` tokens, that had `backlog` tokens beyond the ordinary to do."""
        if backlog == 0:
            self.drafts.record(sequences, seconds / longest)
        else:
            self._backlog.append(max(seconds - longest * self.draft_step(sequences), 0.0) / backlog)

    def step(self, rows: int) -> float | None:
        """Seconds of a forward over `rows` tokens; None before five steps were timed."""
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
