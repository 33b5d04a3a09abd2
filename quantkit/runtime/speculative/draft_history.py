"""The recent drafts of a request, and the draft length that they suggest."""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

#: Steps before the first probe.
FIRST_PAUSE = 8

#: A draft length must promise this much more speed than no draft.
_MARGIN = 1.03

#: Decay of older outcomes per judged token: about the last 25 tokens decide.
_FADE = 0.96


def best_length(rate: float, seconds: SequenceOf[float]) -> int:
    """The draft length that gives the most tokens per second; 0 if none is faster than no draft by a margin.

    Args:
        rate: probability that a draft token is accepted.
        seconds: time of a step with drafts of 0, 1, 2, ... tokens.
    """
    best, most, tokens = 0, _MARGIN, 1.0
    for length in range(1, len(seconds)):
        tokens += rate**length
        gain = tokens * seconds[0] / seconds[length]
        if gain > most:
            best, most = length, gain
    return best


@dataclass
class DraftHistory:
    """The recent drafts of a request.

    Attributes:
        accepted: tokens that were accepted; decays.
        judged: tokens that were accepted or rejected, without those after a rejected one; decays.
        pause: steps between probes.
        waited: steps since the last draft.
        steps_to_next_check: steps until it is checked again whether a draft pays.
        balance: seconds gained and allowed to be lost, minus seconds lost.
    """

    accepted: float
    judged: float
    pause: int = FIRST_PAUSE
    waited: int = 0
    steps_to_next_check: int = 0
    balance: float = 0.0

    @property
    def rate(self) -> float:
        """Estimated probability that a draft token is accepted."""
        return self.accepted / self.judged

    @property
    def acceptance_upper_bound(self) -> float:
        """That probability plus one standard deviation, in case the tokens so far were unlucky."""
        return min(self.rate + math.sqrt(self.rate * (1 - self.rate) / self.judged), 1.0)

    def record(self, drafted: int, accepted: int) -> None:
        """Add a draft of which the first `accepted` tokens were accepted."""
        judged = min(accepted + 1, drafted)
        self.accepted = _FADE**judged * self.accepted + accepted
        self.judged = _FADE**judged * self.judged + judged
        self.waited = self.steps_to_next_check = 0
