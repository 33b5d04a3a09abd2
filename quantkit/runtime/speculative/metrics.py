"""Statistics of the drafts of a run."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SpeculationStats:
    """Statistics of speculation so far; ratios are None where the denominator is zero.

    Attributes:
        drafts: verified drafts, without empty ones.
        drafted, accepted: their tokens.
        acceptance_rate: accepted / drafted.
        mean_accepted_length: tokens per verified draft, including the one that the model adds after the accepted ones.
        accepted_by_position: per position, drafts whose token there was accepted.
        acceptance_by_position: per position, the share of the drafts that reach it whose token there was accepted.
        draft_seconds: total time of proposing.
        cost_ratio: seconds per draft step (one more token for all sequences) / seconds per verifying step, over steps in which
            neither the model nor the drafter computes prompts.
        speed_up: decoding time without drafts / decoding time. The time without drafts is that of as many tokens in plain
            steps, as the same run timed them. None if drafts have a fixed length, because then there are no plain steps.
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
    """Decoding steps of one kind: the time they took, and the time of their tokens in undisturbed plain steps."""

    seconds: float = 0.0
    undisturbed: float = 0.0

    def add(self, seconds: float, undisturbed: float) -> None:
        """Add a step."""
        self.seconds += seconds
        self.undisturbed += undisturbed


@dataclass
class SpecMetrics:
    """Collects counts and times; see `SpeculationStats`."""

    drafts: int = 0
    reached: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    _pure_draft_seconds: float = 0.0
    _pure_verify_seconds: float = 0.0
    _draft_steps: int = 0
    _verify_steps: int = 0
    #: Steps without drafts, and steps with drafts.
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
            draft_seconds: time of proposing.
            verify_seconds: time of the forward and the verification.
            pure: whether model and drafter computed only newest tokens and drafts, and no prompts.
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
            undisturbed: seconds of such a step if nothing disturbs it; None while that is unknown.
        """
        self.draft_seconds += draft_seconds
        if undisturbed is not None:
            self._plain.add(draft_seconds + seconds, undisturbed)

    def compare(self, seconds: float, undisturbed: float) -> None:
        """Add the time of a decoding step with drafts, and the time of its tokens in undisturbed plain steps."""
        self._drafted.add(seconds, undisturbed)

    def stats(self) -> SpeculationStats:
        """The statistics so far."""
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
        # Assume that steps with and without drafts were disturbed equally.
        without = plain.seconds * (1 + drafted.undisturbed / plain.undisturbed)
        return without / (plain.seconds + drafted.seconds)


def _shares(parts: SequenceOf[int], wholes: SequenceOf[int]) -> list[float]:
    return [part / whole for part, whole in zip(parts, wholes, strict=True)]
