"""How many tokens to draft: what pays by the running acceptance rate and the measured costs, and nothing where it does not.

A draft of d tokens of which each is accepted with probability a gives E = 1 + a + ... + a^d tokens (Leviathan et al., arXiv
2211.17192, equation 1) in the time of d draft steps and a forward over d + 1 rows. The length with the most tokens a second
is taken; 0 is one of them. With rows that cost alike, what is right for a batch in which all draft alike is right for one
sequence of it, so each decides as if the others did as it does.

Two things keep bad guesses cheap. A sequence that does not draft probes only after a pause, which doubles with each probe
in vain. And losses are bounded: time lost against plain steps is taken out of a credit that grows by a small share of all
time and by what speculation gains, up to a cap; without credit nothing is drafted.

Times come from outside, so that every decision is a function of what was noted.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from quantkit.runtime.costs import ORDINARY_BACKLOG, Costs
from quantkit.runtime.sequence import Sequence, Status

#: Longest draft; with the token before it, what the decode graphs of a GPU take (`graphs.MAX_QUERY_LEN`).
MOST_DRAFTED = 15

#: A length must promise this much more speed than none.
_MARGIN = 1.03

#: Credit, in plain steps: at the start, at most, and its growth a plain step.
_CREDIT, _MOST_CREDIT, _SHARE = 2.0, 4.0, 0.02

#: Tokens of a probe; steps before the first one, and before any.
_PROBE, _FIRST_PAUSE, _LONGEST_PAUSE = 2, 8, 512

#: After this many steps with drafts comes one without, so that the cost of a plain step stays known.
_STREAK = 32

#: What older outcomes count after each draft, and after each probe: what was long ago says little.
_KEEP, _KEEP_AT_PROBE = 0.9, 0.5


def best_length(rate: float, seconds: SequenceOf[float]) -> tuple[int, float]:
    """The draft length that gives the most tokens a second, and its speed over that of no draft.

    Args:
        rate: probability that a draft token is accepted.
        seconds: of a step with drafts of 0, 1, 2, ... tokens.

    Returns:
        0 and 1.0 where no length is faster than none by a margin.
    """
    best, most, tokens = 0, _MARGIN, 1.0
    for length in range(1, len(seconds)):
        tokens += rate**length
        gain = tokens * seconds[0] / seconds[length]
        if gain > most:
            best, most = length, gain
    return best, most if best else 1.0


@dataclass
class Record:
    """A request's recent drafts.

    Attributes:
        accepted, judged: tokens accepted; tokens accepted or rejected, those behind a rejected one left out. Both fade.
        pause: steps between probes.
        waited: steps since the last draft.
    """

    accepted: float
    judged: float
    pause: int = _FIRST_PAUSE
    waited: int = 0

    @property
    def rate(self) -> float:
        """Probability that a token is accepted."""
        return self.accepted / self.judged

    def note(self, drafted: int, accepted: int, keep: float) -> None:
        """Add a draft of which the first `accepted` tokens were accepted."""
        self.accepted = keep * self.accepted + accepted
        self.judged = keep * self.judged + min(accepted + 1, drafted)


class AdaptiveLength:
    """Draft lengths of all requests of an engine.

    Attributes:
        costs: of steps.
    """

    def __init__(self) -> None:
        self.costs = Costs()
        self._records: dict[Sequence, Record] = {}
        #: Of all requests; a new one starts from it.
        self._common = Record(accepted=2.0, judged=4.0)
        self._credit = _CREDIT
        self._streak = 0
        #: Of the last number of sequences that was asked about, until a step is timed.
        self._known: tuple[int, list[float]] = 0, []

    def length(self, sequence: Sequence, running: int, backlog: int) -> int:
        """How many tokens to draft for a sequence.

        Args:
            sequence: decodes.
            running: sequences that decode.
            backlog: what its drafter must catch up on, in tokens.
        """
        seconds = self._seconds(running)
        if not seconds or self._credit <= 0 or self._streak >= _STREAK:
            return 0
        record = self._records.setdefault(sequence, Record(4 * self._common.rate, 4.0))
        record.waited += 1
        length, gain = best_length(record.rate, seconds)
        extra = self.costs.backlog(max(backlog - ORDINARY_BACKLOG, 0)) / seconds[0]
        if length and extra <= (sequence.limit - len(sequence.tokens)) * (1 - 1 / gain):
            return length
        risk = seconds[_PROBE] / seconds[0] - 1 + extra
        return _PROBE if record.waited > record.pause and risk <= self._credit else 0

    def note_draft(self, sequence: Sequence, running: int, drafted: int, accepted: int) -> None:
        """Add a draft, not empty, and how many of its tokens were accepted."""
        record = self._records[sequence]
        probed = best_length(record.rate, self._seconds(running))[0] == 0
        record.note(drafted, accepted, _KEEP_AT_PROBE if probed else _KEEP)
        self._common.note(drafted, accepted, _KEEP)
        record.waited = 0
        if accepted == drafted:
            record.waited, record.pause = record.pause, _FIRST_PAUSE  # It is worth another look at once.
        elif probed:
            record.pause = min(2 * record.pause, _LONGEST_PAUSE)

    def note_step(
        self, running: int, rows: int, longest: int, backlog: int, tokens: int, seconds: tuple[float, float]
    ) -> None:
        """Add a step in which nothing but newest tokens and drafts was computed.

        Args:
            running: sequences in it.
            rows: tokens computed.
            longest: of its drafts.
            backlog: tokens beyond the ordinary that drafters caught up on.
            tokens: new tokens that came out.
            seconds: of proposing, and of the rest.
        """
        drafting, verifying = seconds
        plain, usual = self.costs.step(running), self.costs.step(rows)
        self.costs.note_step(rows, verifying)
        if usual is not None and not self.costs.is_timed(rows):
            verifying = min(verifying, usual)  # what was compiled for the first step over so many rows is not lost
        self._known = 0, []
        self._streak = self._streak + 1 if longest else 0
        if longest:
            self.costs.note_draft(longest, backlog, drafting)
        if plain is None:
            return
        self._credit += _SHARE * tokens / running
        if longest:
            # Catching up is an investment: it was weighed before, and what it buys comes later.
            spent = verifying + max(drafting - self.costs.backlog(backlog), 0.0)
            self._credit += tokens / running - spent / plain
        self._credit = min(self._credit, _MOST_CREDIT)

    def released(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended; one that was preempted comes back."""
        if sequence.status is Status.FINISHED:
            self._records.pop(sequence, None)

    def _seconds(self, running: int) -> list[float]:
        """Of a step with drafts of 0, 1, 2, ... tokens for `running` sequences."""
        if self._known[0] != running:
            self._known = running, self.costs.rounds(running, MOST_DRAFTED)
        return self._known[1]
