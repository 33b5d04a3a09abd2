"""What became of the drafts of a run, in numbers."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SpeculationStats:
    """Speculation so far; ratios are None where there is nothing to divide by.

    Attributes:
        drafts: drafts that were verified, the empty ones left out.
        drafted, accepted: tokens of these.
        acceptance_rate: accepted / drafted.
        mean_accepted_length: tokens that a verified draft gave, the one behind the accepted ones included.
        accepted_by_position: drafts whose token at a position was accepted.
        acceptance_by_position: of the drafts that reach a position, the share whose token there was accepted.
        draft_seconds: spent on proposing, in all.
        cost_ratio: seconds of a draft step (one token more for all sequences) / seconds of a step that verifies; without
            steps in which the model or the drafter computes prompts.
        speed_up: seconds without drafts / seconds, of decoding steps: those with drafts against as many tokens in steps
            without, as the same run timed these. None where drafts have a fixed length, and so nothing to compare them with.
    """

    drafts: int
    drafted: int
    accepted: int
    acceptance_rate: float | None
    mean_accepted_length: float | None
    accepted_by_position: list[int]
    acceptance_by_position: list[float]
    draft_seconds: float
    cost_ratio: float | None
    speed_up: float | None


@dataclass
class _Compared:
    """Decoding steps of a kind: the time they took, and what their tokens take without drafts if nothing disturbs them."""

    seconds: float = 0.0
    undisturbed: float = 0.0

    def add(self, seconds: float, undisturbed: float) -> None:
        """Add a step."""
        self.seconds += seconds
        self.undisturbed += undisturbed


@dataclass
class SpecMetrics:
    """Counts and times as they come in; see `SpeculationStats`."""

    drafts: int = 0
    reached: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    _pure_draft_seconds: float = 0.0
    _pure_verify_seconds: float = 0.0
    _draft_steps: int = 0
    _verify_steps: int = 0
    #: Steps without and with drafts.
    _plain: _Compared = field(default_factory=_Compared)
    _drafted: _Compared = field(default_factory=_Compared)

    def count(self, drafted: int, accepted: int) -> None:
        """Add a draft of `drafted` tokens, of which the first `accepted` were accepted."""
        self.drafts += drafted > 0
        missing = drafted - len(self.reached)
        self.reached.extend([0] * missing)
        self.passed.extend([0] * missing)
        for position in range(drafted):
            self.reached[position] += 1
            self.passed[position] += position < accepted

    def time(self, longest: int, draft_seconds: float, verify_seconds: float, *, pure: bool) -> None:
        """Add a step's times.

        Args:
            longest: tokens of its longest draft.
            draft_seconds, verify_seconds: of proposing, and of the forward and the verification.
            pure: whether it computed newest tokens and drafts and nothing else, in the model and in the drafter.
        """
        self.draft_seconds += draft_seconds
        if longest and pure:
            self._pure_draft_seconds += draft_seconds
            self._pure_verify_seconds += verify_seconds
            self._draft_steps += longest
            self._verify_steps += 1

    def plain(self, draft_seconds: float, seconds: float, undisturbed: float | None) -> None:
        """Add a decoding step without drafts.

        Args:
            draft_seconds, seconds: as for `time`.
            undisturbed: what such a step takes where nothing disturbs it; None while that is unknown.
        """
        self.draft_seconds += draft_seconds
        if undisturbed is not None:
            self._plain.add(draft_seconds + seconds, undisturbed)

    def compare(self, seconds: float, undisturbed: float) -> None:
        """Add the time of a decoding step with drafts, and what its tokens take in undisturbed steps without."""
        self._drafted.add(seconds, undisturbed)

    def stats(self) -> SpeculationStats:
        """The numbers so far."""
        drafted, accepted = sum(self.reached), sum(self.passed)
        verify = self._pure_verify_seconds / max(self._verify_steps, 1)
        return SpeculationStats(
            drafts=self.drafts,
            drafted=drafted,
            accepted=accepted,
            acceptance_rate=accepted / drafted if drafted else None,
            mean_accepted_length=1 + accepted / self.drafts if self.drafts else None,
            accepted_by_position=list(self.passed),
            acceptance_by_position=_shares(self.passed, self.reached),
            draft_seconds=self.draft_seconds,
            cost_ratio=self._pure_draft_seconds / self._draft_steps / verify if verify else None,
            speed_up=self._speed_up(),
        )

    def _speed_up(self) -> float | None:
        plain, drafted = self._plain, self._drafted
        if not plain.undisturbed:
            return None
        # Steps with drafts were disturbed as those without were.
        without = plain.seconds * (1 + drafted.undisturbed / plain.undisturbed)
        return without / (plain.seconds + drafted.seconds)


def _shares(parts: SequenceOf[int], wholes: SequenceOf[int]) -> list[float]:
    return [part / whole for part, whole in zip(parts, wholes, strict=True)]
