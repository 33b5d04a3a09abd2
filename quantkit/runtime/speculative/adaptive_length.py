"""How many tokens to draft: what pays by the running acceptance rate and the measured costs, within what may be lost.

A draft of d tokens of which each is accepted with probability a gives E = 1 + a + ... + a^d tokens (Leviathan et al., arXiv
2211.17192, equation 1) in the time of d draft steps and a forward over d + 1 rows. The length with the most tokens a second
is taken; 0 is one of them. With rows that cost alike, what is right for a batch in which all draft alike is right for one
sequence of it, so each decides as if the others did as it does.

However wrong these estimates are, little can be lost. Accounts are kept, one for the engine and one for each request: what
drafting has gained or lost in seconds that really passed, against plain steps for the same tokens, and a small share of the
time of these. A draft is as long as both accounts cover it if nothing of it is accepted. So at any moment the time lost, of a
request and of all together, is at most

    _SHARE of the time that plain steps would have taken, and _START plain steps

but for what a round takes longer than rounds did before, which the next ones pay off. Of what befalls a round from outside
(a kernel that is compiled, a machine that stalls) no more is charged than makes it cost twice as much as usual: it would have
befallen plain steps as well. A stall in a plain step is not believed (see `costs`). A drafter that has to catch up on a text,
which buys drafts far ahead, may spend another _SHARE of the rest of the text on it.

A sequence for which drafts do not pay probes now and then, after a pause that doubles with each probe in vain. Costs are
known to all requests of an engine, and a new one starts with the latest requests' acceptance rate and pause.

Times come from outside, so that every decision is a function of what was noted.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from quantkit.runtime.core.sequence import Sequence, Status
from quantkit.runtime.speculative.cost_model import ORDINARY_BACKLOG, CostModel
from quantkit.runtime.speculative.draft_history import FIRST_PAUSE, DraftHistory, best_length
from quantkit.runtime.speculative.proposers import MAX_DRAFT_LEN

#: What may be lost: a share of the time of plain steps, and as many of them at once.
_SHARE, _START = 0.02, 1.0

#: A round is charged at most this many times what its parts usually cost.
_MOST_CHARGED = 2

#: Tokens of a probe. While the cost of drafts is unknown, one.
_PROBE = 2

#: Steps before a probe at most, and at most for a new request.
_LONGEST_PAUSE, _LONGEST_INHERITED = 512, 64

#: Steps between looks at whether drafts have come to pay: a look costs half a percent of a short step.
_LOOK = 4

#: After this many steps with drafts comes one without, so that the cost of a plain step stays known.
_STREAK = 32

#: Tokens that a new request's rate counts for.
_PRIOR = 4.0


@dataclass(frozen=True)
class DraftedStep:
    """What came of a step with drafts, or with prompts beside.

    Attributes:
        outcomes: of every sequence that decoded: tokens drafted, and of these accepted.
        backlog: tokens beyond the ordinary that drafters caught up on.
        draft_seconds: of proposing.
        verify_seconds: of the forward and the verification; None where it computed prompts, too.
    """

    outcomes: dict[Sequence, tuple[int, int]]
    backlog: int
    draft_seconds: float
    verify_seconds: float | None


class AdaptiveLength:
    """Draft lengths of all requests of an engine.

    Attributes:
        costs: of steps.
    """

    def __init__(self) -> None:
        self.costs = CostModel()
        self._histories: dict[Sequence, DraftHistory] = {}
        #: Of all requests.
        self._common = DraftHistory(accepted=2.0, judged=4.0)
        self._streak = 0
        #: What was last asked for, and the answer: worked out anew with every step, it would cost half a percent of one.
        self._asked: tuple[int, int, int] = 0, 0, 0
        self._known: list[float] = []

    def length(self, sequence: Sequence, running: int, backlog: int) -> int:
        """How many tokens to draft for a sequence.

        Args:
            sequence: decodes.
            running: sequences that decode.
            backlog: what its drafter must catch up on, in tokens.
        """
        history = self._history(sequence)
        history.waited += 1
        history.steps_to_next_check -= 1
        if history.steps_to_next_check > 0 or self._streak >= _STREAK:
            return 0
        seconds = self._seconds(running)
        if not seconds:
            return 0
        wanted = best_length(history.rate, seconds)
        if not wanted and (history.waited > history.pause or best_length(history.acceptance_upper_bound, seconds)):
            wanted = _PROBE if self.costs.drafts.samples else 1
        if not wanted:
            history.steps_to_next_check = _LOOK
            return 0
        # Were all to draft alike.
        covered = seconds[0] * (1 + _START) + min(self._common.balance, running * history.balance)
        length = next((each for each in range(wanted, 0, -1) if seconds[each] <= covered), 0)
        if not length:
            missing = seconds[1] - covered
            history.steps_to_next_check = min(
                int(missing / (_SHARE * seconds[0])), _LOOK
            )  # Each plain step covers a little of it.
        catching_up = self.costs.backlog(max(backlog - ORDINARY_BACKLOG, 0), seconds[0])
        left = (sequence.limit - len(sequence.tokens)) * seconds[0]
        return length if catching_up <= _SHARE * left else 0

    def record(self, step: DraftedStep) -> None:
        """Add a step that is not plain, see `record_plain_step`."""
        running, longest = len(step.outcomes), max(drafted for drafted, _ in step.outcomes.values())
        if longest:
            self._judge(step.outcomes, running)
        plain = self.costs.step(running)
        if plain is not None:
            self._update_balances(step, plain, self._lost(step, plain) if longest else 0.0)
        if step.verify_seconds is not None:
            self.costs.steps.record(running + sum(drafted for drafted, _ in step.outcomes.values()), step.verify_seconds)
        if longest:
            drafting = sum(drafted > 0 for drafted, _ in step.outcomes.values())
            self.costs.record_drafting(drafting, longest, step.backlog, step.draft_seconds)
        self._streak = self._streak + 1 if longest else 0
        self._common.waited += 1

    def record_plain_step(self, sequences: SequenceOf[Sequence], seconds: float) -> float | None:
        """Add a step in which these sequences decoded, nothing else was computed and nothing drafted.

        Returns:
            What such a step took before; None while that is unknown.
        """
        running = len(sequences)
        plain = self.costs.step(running)
        if plain is not None:
            for sequence in sequences:
                self._history(sequence).balance += _SHARE * plain / running
            self._common.balance += _SHARE * plain
        self.costs.steps.record(running, seconds)
        self._streak = 0
        self._common.waited += 1
        return plain

    def released(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended; one that was preempted comes back."""
        if sequence.status is Status.FINISHED:
            self._histories.pop(sequence, None)

    def _judge(self, outcomes: dict[Sequence, tuple[int, int]], running: int) -> None:
        """Learn from the drafts of a step."""
        seconds = self._seconds(running)
        for sequence, (drafted, accepted) in outcomes.items():
            if drafted:
                history = self._history(sequence)
                probed = best_length(history.rate, seconds) == 0
                history.record(drafted, accepted)
                self._common.record(drafted, accepted)
                if accepted == drafted and best_length(1.0, seconds):
                    history.waited, history.pause = history.pause, FIRST_PAUSE  # It is worth another look at once.
                elif probed:
                    history.pause = min(2 * history.pause, _LONGEST_PAUSE)
                self._common.pause = history.pause

    def _lost(self, step: DraftedStep, plain: float) -> float:
        """Seconds that a step with drafts took longer than a plain one."""
        rows, longest = len(step.outcomes), max(drafted for drafted, _ in step.outcomes.values())
        rows += sum(drafted for drafted, _ in step.outcomes.values())
        usual, drafting = self.costs.step(rows), step.draft_seconds
        assert usual is not None
        verifying = usual if step.verify_seconds is None else min(step.verify_seconds, _MOST_CHARGED * usual)
        if step.backlog:
            drafting = longest * self.costs.draft_step(len(step.outcomes))  # Catching up has an allowance of its own.
        else:
            known = self.costs.draft_step(len(step.outcomes))
            drafting = min(drafting, longest * (_MOST_CHARGED * known if known else plain))
        return drafting + verifying - plain

    def _update_balances(self, step: DraftedStep, plain: float, lost: float) -> None:
        """Enter a step in the accounts: each sequence pays for its part of the drafts."""
        token = plain / len(step.outcomes)
        drafts = max(sum(drafted for drafted, _ in step.outcomes.values()), 1)
        for sequence, (drafted, accepted) in step.outcomes.items():
            change = token * (accepted + _SHARE * (1 + accepted)) - lost * drafted / drafts
            self._history(sequence).balance += change
            self._common.balance += change

    def _history(self, sequence: Sequence) -> DraftHistory:
        if sequence not in self._histories:
            common = self._common
            pause = min(common.pause, _LONGEST_INHERITED)
            self._histories[sequence] = DraftHistory(_PRIOR * common.rate, _PRIOR, pause, common.waited)
        return self._histories[sequence]

    def _seconds(self, running: int) -> list[float]:
        """Of a step with drafts of 0, 1, 2, ... tokens for `running` sequences."""
        asked = running, self.costs.steps.changes, self.costs.drafts.changes
        if asked != self._asked or not self._known:
            self._asked, self._known = asked, self.costs.rounds(running, MAX_DRAFT_LEN)
        return self._known
