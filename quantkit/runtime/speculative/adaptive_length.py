"""How many tokens to draft: the length that is fastest by the acceptance rate and the measured costs, with bounded losses.

A draft of d tokens, each accepted with probability a, gives E = 1 + a + ... + a^d tokens (Leviathan et al., arXiv 2211.17192,
equation 1) in the time of d draft steps and one forward over d + 1 rows. The length with the most tokens per second is chosen;
0 is one of the candidates. If every row costs the same, the length that is right for a batch in which all sequences draft
alike is also right for one sequence of it. So each sequence decides as if the others drafted as many tokens.

However wrong these estimates are, little time can be lost. There is an account for the engine and one for each request. It
adds up what drafting has gained or lost, in measured seconds against plain steps for the same tokens, plus a small share of
the time of plain steps. A draft is only as long as both accounts can pay for if none of its tokens is accepted. So at any
moment the time lost, by one request and by all together, is at most

    _SHARE of the time that plain steps would have taken, and _START plain steps

plus the time by which a round exceeds earlier rounds, which the next rounds pay off. An outlier round (compilation, a stalled
machine) is charged at most twice its usual cost, because plain steps would have suffered as well. A stall in a plain step is
ignored (see `cost_model`). A drafter that has to catch up on a text invests in many later drafts, so it may spend another
_SHARE of the time of the remaining text on that.

A sequence for which drafts do not pay probes now and then, after a pause that doubles with each failed probe. Costs are shared
by all requests of an engine, and a new request starts with the acceptance rate and the pause of the latest ones.

Times are passed in by the caller, so every decision is a function of what was recorded.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from quantkit.runtime.core.sequence import Sequence, Status
from quantkit.runtime.speculative.cost_model import ORDINARY_BACKLOG, CostModel
from quantkit.runtime.speculative.draft_history import FIRST_PAUSE, DraftHistory, best_length
from quantkit.runtime.speculative.proposers import MAX_DRAFT_LEN

#: What may be lost: this share of the time of plain steps, and this many plain steps at once.
_SHARE, _START = 0.02, 1.0

#: A round is charged at most this multiple of what its parts usually cost.
_MOST_CHARGED = 2

#: Tokens per probe; one while the cost of drafts is unknown.
_PROBE = 2

#: Most steps before a probe, and most that a new request inherits.
_LONGEST_PAUSE, _LONGEST_INHERITED = 512, 64

#: Steps between checks whether drafts have begun to pay: a check costs half a percent of a short step.
_CHECK_INTERVAL = 4

#: After this many steps with drafts comes one without, so that the cost of a plain step stays current.
_STREAK = 32

#: Weight of the acceptance rate that a new request inherits, in tokens.
_PRIOR = 4.0


@dataclass(frozen=True)
class DraftedStep:
    """The outcome of a step that drafted, or that also computed prompts.

    Attributes:
        outcomes: every sequence that decoded -> tokens drafted, and how many of these were accepted.
        backlog: tokens beyond `ORDINARY_BACKLOG` that drafters caught up on.
        draft_seconds: time of proposing.
        verify_seconds: time of the forward and the verification; None if the step also computed prompts.
    """

    outcomes: dict[Sequence, tuple[int, int]]
    backlog: int
    draft_seconds: float
    verify_seconds: float | None


class AdaptiveLength:
    """Chooses the draft lengths of all requests of an engine.

    Attributes:
        costs: of steps and drafts.
    """

    def __init__(self) -> None:
        self.costs = CostModel()
        self._histories: dict[Sequence, DraftHistory] = {}
        #: The history of all requests together.
        self._common = DraftHistory(accepted=2.0, judged=4.0)
        self._streak = 0
        #: The last question and its answer: computing it anew in every step would cost half a percent of a step.
        self._asked: tuple[int, int, int] = 0, 0, 0
        self._known: list[float] = []

    def length(self, sequence: Sequence, running: int, backlog: int) -> int:
        """How many tokens to draft for a sequence.

        Args:
            sequence: one that decodes in this step.
            running: number of sequences that decode in this step.
            backlog: tokens that its drafter must catch up on.
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
            history.steps_to_next_check = _CHECK_INTERVAL
            return 0
        # As if all sequences drafted alike.
        covered = seconds[0] * (1 + _START) + min(self._common.balance, running * history.balance)
        length = next((each for each in range(wanted, 0, -1) if seconds[each] <= covered), 0)
        if not length:
            missing = seconds[1] - covered
            # Each plain step earns a little of what is missing.
            history.steps_to_next_check = min(int(missing / (_SHARE * seconds[0])), _CHECK_INTERVAL)
        catching_up = self.costs.backlog(max(backlog - ORDINARY_BACKLOG, 0), seconds[0])
        left = (sequence.limit - len(sequence.tokens)) * seconds[0]
        return length if catching_up <= _SHARE * left else 0

    def record(self, step: DraftedStep) -> None:
        """Add a step that is not plain; see `record_plain_step`."""
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
        """Add a step that decoded these sequences, drafted nothing and computed no prompts.

        Returns:
            Seconds that such a step usually takes; None while that is unknown.
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
        """Forget a sequence if it has ended; a preempted one will come back."""
        if sequence.status is Status.FINISHED:
            self._histories.pop(sequence, None)

    def _judge(self, outcomes: dict[Sequence, tuple[int, int]], running: int) -> None:
        """Update acceptance rates and pauses from the drafts of a step."""
        seconds = self._seconds(running)
        for sequence, (drafted, accepted) in outcomes.items():
            if drafted:
                history = self._history(sequence)
                probed = best_length(history.rate, seconds) == 0
                history.record(drafted, accepted)
                self._common.record(drafted, accepted)
                if accepted == drafted and best_length(1.0, seconds):
                    history.waited, history.pause = history.pause, FIRST_PAUSE  # Probe again at once.
                elif probed:
                    history.pause = min(2 * history.pause, _LONGEST_PAUSE)
                self._common.pause = history.pause

    def _lost(self, step: DraftedStep, plain: float) -> float:
        """Seconds by which a step with drafts took longer than a plain one."""
        rows, longest = len(step.outcomes), max(drafted for drafted, _ in step.outcomes.values())
        rows += sum(drafted for drafted, _ in step.outcomes.values())
        usual, drafting = self.costs.step(rows), step.draft_seconds
        assert usual is not None
        verifying = usual if step.verify_seconds is None else min(step.verify_seconds, _MOST_CHARGED * usual)
        if step.backlog:
            drafting = longest * self.costs.draft_step(len(step.outcomes))  # Catching up is paid for separately, see `length`.
        else:
            known = self.costs.draft_step(len(step.outcomes))
            drafting = min(drafting, longest * (_MOST_CHARGED * known if known else plain))
        return drafting + verifying - plain

    def _update_balances(self, step: DraftedStep, plain: float, lost: float) -> None:
        """Enter a step in the accounts. Each sequence pays for its share of the drafted tokens."""
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
        """Seconds of a step in which `running` sequences draft 0, 1, 2, ... tokens each."""
        asked = running, self.costs.steps.changes, self.costs.drafts.changes
        if asked != self._asked or not self._known:
            self._asked, self._known = asked, self.costs.rounds(running, MAX_DRAFT_LEN)
        return self._known
