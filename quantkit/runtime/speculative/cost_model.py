"""What steps cost on this machine: the minimum of the latest times of steps of the same kind.

Other load on a machine makes a step slower and never faster, and many times slower if the process is paused for 30 ms. A mean
would count that as the cost of a step. So would a median if it happened in two of the first three plain steps: drafts would
then look cheap in comparison, and as long as they are used no plain step is timed that would correct this.

The first time of each kind is ignored, because kernels may be compiled or graphs captured in it. For backlog and prompts,
which come in pieces of all sizes, the median is used.
"""

from bisect import bisect_left, insort
from collections import deque
from statistics import median

#: How many of the latest times of a kind count.
_WINDOW = 7

#: While only one number of rows has been timed, twice as many rows are assumed to cost this share more.
_GUESSED_SLOPE = 0.3

#: Rows beyond the most that were timed are assumed to cost this share of the last ones. This optimism makes longer drafts be
#: tried, and so timed.
_EXTRAPOLATION = 0.5

#: The cost of a step counts as known after this many times: it is unlikely that all of them were disturbed.
_FEWEST = 5

#: A backlog of up to this many tokens per sequence is ordinary: it is part of the cost of a draft step.
ORDINARY_BACKLOG = 2


class LatencyCurve:
    """Seconds as a function of a count: linear between the counts that were timed, less steep beyond.

    Attributes:
        samples: how many times were recorded, without the first of each count.
        changes: how often the curve has changed.
    """

    def __init__(self) -> None:
        self.samples = self.changes = 0
        self._times: dict[int, deque[float]] = {}
        #: Timed counts in ascending order, and the least time of each.
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
        """Seconds for a count; at least one count must have been timed."""
        known = self._counts
        if count == known[0]:  # The most frequent case: a plain step of all running sequences.
            return self._least[count]
        if len(known) == 1:
            (only,) = known
            return self._least[only] * (1 + _GUESSED_SLOPE * max(count - only, 0) / only)
        place = min(max(bisect_left(known, count), 1), len(known) - 1)
        low, high = known[place - 1], known[place]
        below, above = self._least[low], self._least[high]
        # More rows never cost less, whatever the noise says. And few rows never cost nothing: extrapolation ends at a quarter.
        slope = (above - below) / (high - low)
        guess = below + slope * (min(count, high) - low) + _EXTRAPOLATION * slope * max(count - high, 0)
        return max(guess, below if count > low else 0.25 * below)


class CostModel:
    """Seconds of forwards with verification, of draft steps, and of backlog.

    Attributes:
        steps: forwards over newest tokens and drafts, verification included, by number of rows.
        drafts: one more draft token for each drafting sequence, by number of these sequences.
    """

    def __init__(self) -> None:
        self.steps, self.drafts = LatencyCurve(), LatencyCurve()
        self._backlog: deque[float] = deque(maxlen=_WINDOW)
        self._prompt: deque[float] = deque(maxlen=_WINDOW)

    def record_prompt(self, rows: int, seconds: float) -> None:
        """Add a forward over `rows` tokens, most of which belong to prompts."""
        self._prompt.append(seconds / rows)

    def record_drafting(self, sequences: int, longest: int, backlog: int, seconds: float) -> None:
        """Add a round of proposals.

        Args:
            sequences: how many drafted.
            longest: tokens of the longest draft.
            backlog: tokens beyond the ordinary that drafters caught up on.
            seconds: of the round.
        """
        if backlog == 0:
            self.drafts.record(sequences, seconds / longest)
        else:
            self._backlog.append(max(seconds - longest * self.draft_step(sequences), 0.0) / backlog)

    def step(self, rows: int) -> float | None:
        """Seconds of a forward over `rows` tokens; None until five steps were timed."""
        return self.steps.at(rows) if self.steps.samples >= _FEWEST else None

    def draft_step(self, sequences: int) -> float:
        """Seconds of one more token in a round of drafts; 0 while unknown."""
        return self.drafts.at(sequences) if self.drafts.samples else 0.0

    def backlog(self, tokens: int, plain: float) -> float:
        """Seconds that `tokens` tokens of backlog take. `plain` is the time of a step without drafts.

        While this is unknown, a token costs what the model itself needs per prompt token; while that is unknown too, an eighth
        of a plain step.
        """
        known = self._backlog or self._prompt
        return tokens * (median(known) if known else plain / 8)

    def rounds(self, sequences: int, longest: int) -> list[float]:
        """Seconds of a step in which `sequences` sequences draft 0, 1, ... `longest` tokens each, including the drafting.

        Empty while the cost of a step is unknown.
        """
        if self.step(sequences) is None:
            return []
        drafting = self.draft_step(sequences)
        return [self.steps.at(sequences * (1 + length)) + length * drafting for length in range(longest + 1)]
