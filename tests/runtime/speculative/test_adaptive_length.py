"""Adaptive draft lengths as a function of recorded steps; all times are made up."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from helpers.sequences import sequence
from quantkit.runtime.core.sequence import Sequence, Status
from quantkit.runtime.speculative.adaptive_length import AdaptiveLength, DraftedStep
from quantkit.runtime.speculative.cost_model import CostModel, LatencyCurve
from quantkit.runtime.speculative.draft_history import best_length
from quantkit.runtime.speculative.proposers import MAX_DRAFT_LEN

PLAIN = 0.01

#: tokens in the text, tokens drafted -> of these accepted.
Accepts = Callable[[int, int], int]


@dataclass
class Machine:
    """What steps cost, in seconds.

    Attributes:
        step: of a forward with verification, by its rows.
        draft: of a draft step.
        measured: what it takes to do what takes so long on a machine that does nothing else.
    """

    step: Callable[[int], float]
    draft: float = 0.0
    measured: Callable[[float], float] = lambda seconds: seconds


def linear(slope: float, draft: float = 0.0) -> Machine:
    """Each row beyond the first costs a share of a plain step, and a draft step another."""
    return Machine(lambda rows: PLAIN * (1 + slope * (rows - 1)), draft * PLAIN)


@dataclass
class Run:
    """What a run was like.

    Attributes:
        seconds, plain_seconds: as it ran; as it would have run without drafts; both on a machine that does nothing else.
        lengths: of every step's longest draft.
        overdrawn: plain steps lost at the worst moment, beyond 2% of the plain steps till then.
    """

    seconds: float = 0.0
    plain_seconds: float = 0.0
    lengths: list[int] = field(default_factory=list)
    overdrawn: float = 0.0

    def add(self, seconds: float, plain_seconds: float, longest: int) -> None:
        """Add a step."""
        self.seconds += seconds
        self.plain_seconds += plain_seconds
        self.lengths.append(longest)
        self.overdrawn = max(self.overdrawn, (self.seconds - 1.02 * self.plain_seconds) / PLAIN)

    @property
    def slowdown(self) -> float:
        """Time over time without drafts."""
        return self.seconds / self.plain_seconds


def run_batch(policy: AdaptiveLength, accepts: list[Accepts], tokens: int, machine: Machine, texts: list[Sequence]) -> Run:
    """Generate `tokens` tokens for each of some texts that run together, with drafts of the policy's lengths."""
    out = Run()
    for text in texts:
        text.limit = len(text.tokens) + tokens
    while texts:
        running = len(texts)
        outcomes: dict[Sequence, tuple[int, int]] = {}
        for text, accepted in zip(texts, accepts, strict=True):
            length = min(policy.length(text, running, 0), text.limit - len(text.tokens) - 1)
            outcomes[text] = length, accepted(len(text.tokens), length) if length else 0
        longest, rows = max(drafted for drafted, _ in outcomes.values()), running
        rows += sum(drafted for drafted, _ in outcomes.values())
        drafting, verifying = longest * machine.draft, machine.step(rows)
        draft_seconds, seconds = machine.measured(drafting), machine.measured(verifying)
        if longest:
            policy.record(DraftedStep(outcomes, 0, draft_seconds, seconds))
        else:
            policy.record_plain_step(texts, seconds)
        made = running + sum(accepted for _, accepted in outcomes.values())
        out.add(drafting + verifying, made * machine.step(running) / running, longest)
        for text, (_, taken) in outcomes.items():
            text.tokens.extend([0] * (taken + 1))
        left = [i for i, text in enumerate(texts) if len(text.tokens) < text.limit]
        texts, accepts = [texts[i] for i in left], [accepts[i] for i in left]
    return out


def run(policy: AdaptiveLength, accepted: Accepts, tokens: int, machine: Machine, text: Sequence | None = None) -> Run:
    """The same with one text."""
    return run_batch(policy, [accepted], tokens, machine, [text or sequence([0] * 4)])


def by_chance(rate: Callable[[int], float] | float, seed: int = 0) -> Accepts:
    """Each token accepted with a probability, which may depend on the place in the text."""
    draw = Random(seed)

    def accepted(place: int, length: int) -> int:
        chance, count = rate(place) if callable(rate) else rate, 0
        while count < length and draw.random() < chance:
            count += 1
        return count

    return accepted


def never(_place: int, _length: int) -> int:
    return 0


def always(_place: int, length: int) -> int:
    return length


def fixed(rate: float, machine: Machine) -> float:
    """Time over time without drafts, of the best fixed length and with many tokens."""
    times = [machine.step(1 + length) + length * machine.draft for length in range(MAX_DRAFT_LEN + 1)]
    expected = itertools.accumulate((rate**length for length in range(1, MAX_DRAFT_LEN + 1)), initial=1.0)
    return min(seconds / tokens for seconds, tokens in zip(times, expected, strict=True)) / PLAIN


def test_the_best_length_is_the_fastest() -> None:
    free, proportional = [1.0] * 9, [1.0 + k for k in range(9)]
    assert best_length(0.5, free) == 8
    # A row that costs as much as a step never pays, not even when all is accepted.
    assert best_length(1.0, proportional) == 0
    assert best_length(0.0, free) == 0
    # E / cost for 0.8 and 30% a row: 1.8/1.3, 2.44/1.6 = 1.525, 2.952/1.9 = 1.554, 3.362/2.2 = 1.528.
    assert best_length(0.8, [1 + 0.3 * k for k in range(9)]) == 3
    # Two per cent are not worth the risk.
    assert best_length(0.02, free) == 0


def test_curves_are_the_least_times_and_lines_between_them() -> None:
    curve = LatencyCurve()
    for seconds in (0.1, 1.1, 1.0, 9.0):  # the first one does not count
        curve.record(2, seconds)
    assert curve.samples == 3
    assert curve.at(2) == 1.0
    assert curve.at(1) == 1.0  # nothing is known of fewer rows
    assert curve.at(4) == pytest.approx(1.3)  # a guess, until it is timed
    curve.record(4, 500.0)
    assert curve.at(4) == pytest.approx(1.3)
    curve.record(4, 2.0)
    assert [curve.at(rows) for rows in (2, 3, 4, 5)] == pytest.approx([1.0, 1.5, 2.0, 2.25])
    for seconds in (0.1, 1.9):
        curve.record(10, seconds)  # within the noise of 4: more rows do not cost less
    assert [curve.at(rows) for rows in (4, 7, 20)] == pytest.approx([2.0, 2.0, 2.0])
    for _ in range(7):  # old times are forgotten
        curve.record(2, 3.0)
    assert curve.at(2) == 3.0


def test_costs_of_rounds() -> None:
    costs = CostModel()
    assert costs.rounds(2, 1) == []
    for seconds in (500.0, 1.0, 9.0, 1.0, 1.1, 9.0):
        assert costs.step(2) is None
        costs.steps.record(2, seconds)
    assert costs.step(2) == 1.0
    costs.record_drafting(2, longest=4, backlog=0, seconds=500)
    assert costs.draft_step(2) == 0
    costs.record_drafting(2, longest=4, backlog=0, seconds=0.4)
    assert costs.draft_step(2) == pytest.approx(0.1)
    assert costs.rounds(2, 1) == pytest.approx([1.0, 1.4])
    assert costs.backlog(8, plain=1.0) == pytest.approx(1.0)
    costs.record_prompt(rows=100, seconds=3.0)
    assert costs.backlog(8, plain=1.0) == pytest.approx(0.24)
    costs.record_drafting(2, longest=2, backlog=100, seconds=1.2)
    assert costs.backlog(50, plain=1.0) == pytest.approx(0.5)


def test_nothing_is_drafted_before_a_plain_step_is_known() -> None:
    assert run(AdaptiveLength(), always, 40, linear(0.1)).lengths[:6] == [0] * 6


SLOPES, DRAFTS, RATES = (0.02, 0.1, 0.3, 1.0), (0.0, 0.35, 0.7, 0.95), (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_loss_is_bounded_at_every_moment_whatever_is_accepted(draft: float, slope: float) -> None:
    turns = (lambda place: float(place < 300), lambda place: float(place >= 300), lambda place: (place // 64) % 2 * 0.9)
    for rate in (*RATES, *turns):
        found = run(AdaptiveLength(), by_chance(rate), 600, linear(slope, draft))
        # A plain step is allowed for, and costs are not yet known of the first round, of one draft step and one row, nor of
        # the first one that is longer.
        assert found.overdrawn <= 1 + (draft + slope)
        assert found.slowdown < 1.05


@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("draft", DRAFTS)
def test_short_texts_in_a_new_engine_are_not_slowed_down_either(draft: float, tokens: int) -> None:
    for slope, rate, seed in itertools.product(SLOPES, RATES, range(3)):
        noise = Random(seed)
        machine = linear(slope, draft)
        machine.measured = lambda seconds, noise=noise: seconds * noise.uniform(0.97, 1.03)  # type: ignore[misc]
        slowdown = run(AdaptiveLength(), by_chance(rate, seed), tokens, machine).slowdown
        assert slowdown < 1.05 + (0.02 if tokens < 100 else 0)


def stalling(seed: int, often: int) -> Callable[[float], float]:
    """Stalls of 25 to 30 ms in steps of every kind, at a given rate per second."""
    draw = Random(seed)
    return lambda seconds: seconds + (draw.uniform(0.025, 0.03) if draw.random() < often * seconds else 0)


@pytest.mark.parametrize("often", [2, 5, 20])
@pytest.mark.parametrize("draft", [0.0, 0.5, 0.8])
def test_a_machine_that_stalls_does_not_make_drafts_look_cheap(draft: float, often: int) -> None:
    for slope, rate, seed in itertools.product((0.3, 0.7), (0.0, 0.4, 0.8, 0.95), range(8)):
        machine = linear(slope, draft)
        machine.measured = stalling(seed, often)
        assert run(AdaptiveLength(), by_chance(rate, seed), 128, machine).slowdown < 1.05


def test_a_machine_that_stalls_does_not_end_drafts_that_pay() -> None:
    for seed in range(8):
        machine = linear(0.1, 0.1)
        machine.measured = stalling(seed, 20)
        lengths = run(AdaptiveLength(), by_chance(0.8, seed), 400, machine).lengths
        assert sum(map(bool, lengths)) > len(lengths) / 2


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("draft", [0.0, 0.1, 0.35])
def test_nine_tenths_of_the_best_fixed_length_are_kept(draft: float, slope: float) -> None:
    machine = linear(slope, draft)
    for rate in RATES:
        policy = AdaptiveLength()
        run(policy, by_chance(rate, 1), 500, machine)
        warm = run(policy, by_chance(rate, 2), 2000, machine)
        assert warm.slowdown <= fixed(rate, machine) / 0.9


def test_an_engine_that_has_learned_drafts_at_once() -> None:
    policy = AdaptiveLength()
    run(policy, by_chance(0.8), 500, linear(0.1))
    short = [run(policy, by_chance(0.8, seed), 64, linear(0.1)) for seed in range(20)]
    assert all(found.lengths[0] > 0 for found in short)
    # What a text of 64 tokens allows: drafts of eight tokens and more are covered only once something was gained.
    assert sum(found.slowdown for found in short) / 20 < fixed(0.8, linear(0.1)) / 0.85


def test_an_engine_in_which_drafts_never_paid_probes_rarely() -> None:
    policy = AdaptiveLength()
    run(policy, never, 600, linear(0.3, 0.7))
    lengths = [length for _ in range(20) for length in run(policy, never, 100, linear(0.3, 0.7)).lengths]
    assert 1 <= sum(map(bool, lengths)) <= 20
    # And finds out when they would.
    assert min(run(policy, always, 200, linear(0.05)).slowdown for _ in range(10)) < 0.6


def test_requests_that_lose_do_not_use_up_what_others_gained() -> None:
    policy = AdaptiveLength()
    for _ in range(20):
        assert run(policy, always, 200, linear(0.1)).slowdown < 0.8
        bad = run(policy, never, 100, linear(0.1))
        assert bad.overdrawn <= 1.2
        assert bad.slowdown < 1.05


@pytest.mark.parametrize("draft", [0.0, 0.5])
@pytest.mark.parametrize("slope", [0.02, 0.1, 0.5])
def test_batches_lose_no_more(slope: float, draft: float) -> None:
    rates = [0.0, 0.1, 0.5, 0.9] * 2

    def step(rows: int) -> float:
        return PLAIN * (1 + slope * (rows - 1))

    machine = Machine(step, draft * PLAIN)
    texts = [sequence([i] * 4) for i in range(len(rates))]
    found = run_batch(AdaptiveLength(), [by_chance(rate, i) for i, rate in enumerate(rates)], 300, machine, texts)
    assert found.slowdown < 1.05


def test_good_texts_of_a_batch_draft_and_bad_ones_do_not() -> None:
    policy, texts = AdaptiveLength(), [sequence([i] * 4) for i in range(4)]
    drafted = [0] * 4

    def counting(i: int, accepted: Accepts) -> Accepts:
        def count(place: int, length: int) -> int:
            drafted[i] += length
            return accepted(place, length)

        return count

    accepts = [counting(i, always if i % 2 else never) for i in range(4)]
    found = run_batch(policy, accepts, 300, linear(0.02), texts)
    assert found.slowdown < 0.9
    assert max(drafted[0], drafted[2]) < min(drafted[1], drafted[3]) / 5


def test_a_text_that_turns_bad_in_the_middle() -> None:
    policy, text = AdaptiveLength(), sequence([0] * 4)
    good, bad = (run(policy, accepted, 400, linear(0.1), text) for accepted in (always, never))
    assert good.slowdown < 0.4
    assert bad.slowdown < 1.05


def test_probes_come_at_growing_intervals_and_find_what_has_changed() -> None:
    policy, text = AdaptiveLength(), sequence([0] * 4)
    bad = run(policy, never, 1500, linear(0.3), text)
    at = [step for step, length in enumerate(bad.lengths) if length]
    tail = [after - before for before, after in itertools.pairwise(at)][-4:-1]
    assert all(later >= 2 * earlier - 1 for earlier, later in itertools.pairwise(tail))
    good = run(policy, always, 3000, linear(0.3), text)
    assert good.lengths.index(MAX_DRAFT_LEN) < 600
    assert good.slowdown < 0.75


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
        return 100.0 if first else PLAIN * (1 + 0.1 * (rows - 1))

    lengths = run(AdaptiveLength(), always, 600, Machine(step)).lengths
    assert lengths.count(MAX_DRAFT_LEN) > len(lengths) / 2


def test_a_dear_second_row_does_not_hide_cheap_ones_behind_it() -> None:
    # Twice as dear for one more row, and nothing for the others: only long drafts pay.
    lengths = run(AdaptiveLength(), always, 1500, Machine(lambda rows: PLAIN if rows == 1 else 2 * PLAIN)).lengths
    assert lengths.count(MAX_DRAFT_LEN) > len(lengths) / 2


@pytest.mark.parametrize("change", [60, 150, 400])
def test_costs_that_rise_at_any_time_are_noticed(change: int) -> None:
    policy, text, sofar = AdaptiveLength(), sequence([0] * 4), Run()
    for tokens, machine in ((change, linear(0.05)), (600, linear(1.0, 0.5))):
        found = run(policy, by_chance(0.6), tokens, machine, text)
        sofar.seconds += found.seconds
        sofar.plain_seconds += found.plain_seconds
    assert found.lengths[-100:].count(0) > 95
    assert sofar.slowdown < 1.05


def test_drafts_beside_a_prompt_are_paid_for_by_estimates() -> None:
    policy, text = AdaptiveLength(), sequence([0] * 4)
    run(policy, never, 200, linear(0.3, 0.5), text)
    history = policy._histories[text]
    before, two_rows = history.balance, policy.costs.steps.at(3) / PLAIN - 1
    policy.record(DraftedStep({text: (2, 0)}, 0, 1.0 * PLAIN, None))
    assert history.balance - before == pytest.approx(PLAIN * (0.02 - 1.0 - two_rows))


def test_a_backlog_is_caught_up_on_only_for_a_small_share_of_the_rest_of_the_text() -> None:
    policy, text = AdaptiveLength(), sequence([0] * 100)
    run(policy, always, 300, linear(0.1, 0.2))
    text.limit = 600
    assert policy.length(text, 1, backlog=100) == 0  # 98 tokens, an eighth of a step each, for 2% of 500 steps
    assert policy.length(text, 1, backlog=1) > 0
    text.limit = 1000
    length = policy.length(text, 1, backlog=100)
    assert length > 0
    policy.record(DraftedStep({text: (length, length)}, 98, 20 * PLAIN, PLAIN))
    assert policy.length(text, 1, backlog=1) > 0  # it was not charged to the drafts after it


def test_a_preempted_request_keeps_its_record_and_a_finished_one_does_not() -> None:
    policy, text = AdaptiveLength(), sequence([0] * 4)
    run(policy, never, 100, linear(0.3), text)
    text.status = Status.WAITING
    policy.released(text)
    assert text in policy._histories
    text.status = Status.FINISHED
    policy.released(text)
    policy.released(text)
    assert text not in policy._histories
