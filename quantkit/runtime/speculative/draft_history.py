"""What is known about a request's drafts, and how long its next one should be by that."""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

#: Steps before the first probe.
FIRST_PAUSE = 8

#: A length must promise this much more speed than none.
_MARGIN = 1.03

#: What older outcomes count after each token that was judged: the last 25 or so have the say.
_FADE = 0.96


def best_length(rate: float, seconds: SequenceOf[float]) -> int:
    """The draft length that gives the most tokens a second; 0 where none is faster than no draft by a margin.

    Args:
        rate: probability that a draft token is accepted.
        seconds: of a step with drafts of 0, 1, 2, ... tokens.
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
    """A request's recent drafts.

    Attributes:
        accepted, judged: tokens accepted; tokens accepted or rejected, those behind a rejected one left out. Both fade.
        pause: steps between probes.
        waited: steps since the last draft.
        steps_to_next_check: steps to the next look at whether one pays.
        balance: seconds gained and allowed to be lost, less those lost.
    """

    accepted: float
    judged: float
    pause: int = FIRST_PAUSE
    waited: int = 0
    steps_to_next_check: int = 0
    balance: float = 0.0

    @property
    def rate(self) -> float:
        """Probability that a token is accepted."""
        return self.accepted / self.judged

    @property
    def acceptance_upper_bound(self) -> float:
        """That probability if the tokens so far were unlucky, by one standard deviation."""
        return min(self.rate + math.sqrt(self.rate * (1 - self.rate) / self.judged), 1.0)

    def record(self, drafted: int, accepted: int) -> None:
        """Add a draft of which the first `accepted` tokens were accepted."""
        judged = min(accepted + 1, drafted)
        self.accepted = _FADE**judged * self.accepted + accepted
        self.judged = _FADE**judged * self.judged + judged
        self.waited = self.steps_to_next_check = 0
