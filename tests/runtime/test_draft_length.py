"""Adaptive draft lengths as a function of what was noted: every time is made up."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from sequences import sequence

from quantkit.runtime.costs import Costs
from quantkit.runtime.draft_length import MOST_DRAFTED, AdaptiveLength, best_length
from quantkit.runtime.sequence import Sequence, Status

PLAIN = 0.01


def linear(slope: float) -> Callable[[int], float]:
    """Seconds of a step by its rows, each row beyond the first costing a share of a plain step."""
    return lambda rows: PLAIN * (1 + slope * (rows - 1))


@dataclass
class Run:
    """What a run of one request was like, in steps.

    Attributes:
        seconds, plain_seconds: as it ran; as it would have run without drafts.
        lengths: of every step's draft.
    """

    seconds: float = 0.0
    plain_seconds: float = 0.0
    lengths: list[int] = field(default_factory=list)

    @property
    def slowdown(self) -> float:
        """Time over time without drafts."""
        return self.seconds / self.plain_seconds


def run(
    policy: AdaptiveLength,
    accepted: Callable[[int, int], int],
    tokens: int,
    step: Callable[[int], float],
    draft: float = 0.0,
    text: Sequence | None = None,
    noise: Callable[[], float] = lambda: 1.0,
) -> Run:
    """Generate, with drafts of the policy's lengths, `accepted(position, length)` tokens of each being accepted."""
    text = text or sequence([0] * 4)
    text.limit = len(text.tokens) + tokens
    out = Run()
    while len(text.tokens) < text.limit:
        length = min(policy.length(text, 1, 0), text.limit - len(text.tokens) - 1)
        found = accepted(len(text.tokens), length) if length else 0
        seconds = draft * length * noise(), step(1 + length) * noise()
        if length:
            policy.note_draft(text, 1, length, found)
        policy.note_step(1, 1 + length, length, 0, found + 1, seconds)
        text.tokens.extend([0] * (found + 1))
        out.lengths.append(length)
        out.seconds += sum(seconds)
        out.plain_seconds += (found + 1) * PLAIN
    return out


def by_chance(rate: float, seed: int = 0) -> Callable[[int, int], int]:
    """Each token accepted with a probability."""
    draw = Random(seed)

    def accepted(_: int, length: int) -> int:
        count = 0
        while count < length and draw.random() < rate:
            count += 1
        return count

    return accepted


def never(_position: int, _length: int) -> int:
    return 0


def always(_position: int, length: int) -> int:
    return length


def test_the_best_length_is_the_fastest() -> None:
    free, proportional = [1.0] * 9, [1.0 + k for k in range(9)]
    assert best_length(0.5, free) == (8, pytest.approx(sum(0.5**i for i in range(9))))
    # A row that costs as much as a step never pays, not even when all is accepted.
    assert best_length(1.0, proportional) == (0, 1.0)
    assert best_length(0.0, free) == (0, 1.0)
    # E / cost for 0.8 and 30% a row: 1.8/1.3, 2.44/1.6 = 1.525, 2.952/1.9 = 1.554, 3.362/2.2 = 1.528.
    assert best_length(0.8, [1 + 0.3 * k for k in range(9)]) == (3, pytest.approx(2.952 / 1.9))
    # Two per cent are not worth the risk.
    assert best_length(0.02, free)[0] == 0


def test_costs_are_medians_and_lines_between_them() -> None:
    costs = Costs()
    assert costs.step(1) is None
    for seconds in (500.0, 1.0, 9.0):
        costs.note_step(2, seconds)
    assert costs.step(2) is None  # the first one may have compiled something
    for seconds in (1.1, 0.9, 1.0):
        costs.note_step(2, seconds)
    assert costs.step(2) == 1.0
    assert costs.step(1) == 1.0  # nothing is known of fewer rows
    assert costs.step(4) == pytest.approx(1.3)  # a guess, until it is timed
    costs.note_step(4, 500.0)
    assert costs.step(4) == pytest.approx(1.3)
    costs.note_step(4, 2.0)
    assert [costs.step(rows) for rows in (2, 3, 4, 5)] == pytest.approx([1.0, 1.5, 2.0, 2.5])
    for seconds in (500.0, 1.9):
        costs.note_step(10, seconds)  # within the noise of 4: more rows do not cost less
    assert [costs.step(rows) for rows in (4, 7, 20)] == pytest.approx([2.0, 2.0, 2.0])
    costs.note_draft(longest=4, backlog=9, seconds=500)
    assert costs.draft_step == costs.backlog(9) == 0
    costs.note_draft(longest=4, backlog=0, seconds=0.4)
    assert costs.draft_step == pytest.approx(0.1)
    assert costs.backlog(8) == pytest.approx(0.2)
    costs.note_draft(longest=2, backlog=100, seconds=1.2)
    assert costs.backlog(50) == pytest.approx(0.5)
    assert costs.rounds(2, 1) == pytest.approx([1.0, 2.1])
    # Old times are forgotten.
    for _ in range(7):
        costs.note_step(2, 3.0)
    assert costs.step(2) == 3.0


def test_nothing_is_drafted_before_a_plain_step_is_known() -> None:
    assert run(AdaptiveLength(), always, 40, linear(0.1)).lengths[:4] == [0] * 4


@pytest.mark.parametrize("slope", [0.02, 0.1, 0.3])
def test_what_is_always_accepted_is_drafted_at_length(slope: float) -> None:
    found = run(AdaptiveLength(), always, 600, linear(slope))
    assert found.lengths.count(MOST_DRAFTED) > len(found.lengths) / 2
    ideal = (1 + slope * MOST_DRAFTED) / (1 + MOST_DRAFTED)
    assert found.slowdown < 1.25 * ideal + 0.05


@pytest.mark.parametrize("tokens", [128, 500, 3000])
@pytest.mark.parametrize("draft", [0.0, 0.3])
@pytest.mark.parametrize("slope", [0.05, 0.3, 1.0])
def test_what_is_never_accepted_costs_five_per_cent_at_most(slope: float, draft: float, tokens: int) -> None:
    assert run(AdaptiveLength(), never, tokens, linear(slope), draft * PLAIN).slowdown < 1.05


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("draft", [0.0, 0.3])
@pytest.mark.parametrize("slope", [0.05, 0.3, 1.0])
def test_no_acceptance_rate_costs_more(slope: float, draft: float, rate: float) -> None:
    for seed in range(3):
        noise = Random(seed)
        # Times that are off by a few per cent, and now and then by a factor.
        found = run(
            *(AdaptiveLength(), by_chance(rate, seed), 400, linear(slope), draft * PLAIN),
            noise=lambda noise=noise: 2.0 if noise.random() < 0.01 else noise.uniform(0.97, 1.03),  # type: ignore[misc]
        )
        # The noise itself is a hundredth, up or down, of the time without drafts, which has none.
        assert found.slowdown < 1.07


def test_a_text_that_turns_bad_in_the_middle() -> None:
    policy, text = AdaptiveLength(), sequence([0] * 4)
    good, bad = (run(policy, accepted, 400, linear(0.1), text=text) for accepted in (always, never))
    assert good.slowdown < 0.4
    assert bad.slowdown < 1.05


def test_probes_come_at_growing_intervals_and_find_what_has_changed() -> None:
    policy, text = AdaptiveLength(), sequence([0] * 4)
    bad = run(policy, never, 1500, linear(0.3), text=text)
    at = [step for step, length in enumerate(bad.lengths) if length]
    tail = [after - before for before, after in itertools.pairwise(at)][-5:]
    assert all(later >= 2 * earlier - 1 for earlier, later in itertools.pairwise(tail))
    good = run(policy, always, 3000, linear(0.3), text=text)
    assert good.lengths.index(MOST_DRAFTED) < 600
    assert good.slowdown < 0.75


def test_a_new_request_starts_from_what_was_learned() -> None:
    policy = AdaptiveLength()
    run(policy, never, 300, linear(0.3))
    assert sum(map(bool, run(policy, never, 100, linear(0.3)).lengths)) <= 4
    policy = AdaptiveLength()
    run(policy, always, 300, linear(0.05))
    assert run(policy, always, 100, linear(0.05)).lengths[0] == MOST_DRAFTED


def test_plain_steps_are_timed_now_and_then() -> None:
    lengths = run(AdaptiveLength(), always, 3000, linear(0.1)).lengths
    streaks = "".join("x" if length else " " for length in lengths).split()
    assert max(map(len, streaks)) <= 32
    assert lengths.count(0) < len(lengths) / 16


def test_a_first_step_that_compiles_does_not_end_speculation() -> None:
    seen: set[int] = set()

    def step(rows: int) -> float:
        first = rows not in seen
        seen.add(rows)
        return 100.0 if first else linear(0.1)(rows)

    lengths = run(AdaptiveLength(), always, 600, step).lengths
    assert lengths.count(MOST_DRAFTED) > len(lengths) / 2


def test_costs_that_change_are_noticed() -> None:
    policy, text = AdaptiveLength(), sequence([0] * 4)
    cheap = run(policy, by_chance(0.6), 300, linear(0.05), text=text)
    assert cheap.slowdown < 0.7
    dear = run(policy, by_chance(0.6), 600, linear(1.0), text=text)
    assert dear.slowdown < 1.05


def test_a_backlog_is_caught_up_on_only_if_the_rest_of_the_text_is_long_enough() -> None:
    policy = AdaptiveLength()
    run(policy, always, 300, linear(0.1), draft=0.2 * PLAIN)
    short, long = sequence([0] * 500), sequence([0] * 500)
    short.limit, long.limit = 510, 1500
    assert policy.length(short, 1, backlog=500) == 0
    assert policy.length(long, 1, backlog=500) > 0
    assert policy.length(short, 1, backlog=1) > 0


def test_a_preempted_request_keeps_its_record_and_a_finished_one_does_not() -> None:
    policy, text = AdaptiveLength(), sequence([0] * 4)
    run(policy, never, 100, linear(0.3), text=text)
    text.status = Status.WAITING
    policy.released(text)
    assert text in policy._records
    text.status = Status.FINISHED
    policy.released(text)
    policy.released(text)
    assert text not in policy._records
