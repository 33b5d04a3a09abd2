"""Drafts through the whole engine, on a model that reveals every wrong slot: whatever is drafted, the text is the model's."""

import itertools
import math
import random
from collections.abc import Callable

import pytest

from helpers.engine_runs import GREEDY, PROMPTS, decode, drain, requests, tokens_of
from helpers.fake_model import VOCAB, FakeModel, expected
from helpers.proposers import Drawer, Guesser, mixed, right, wrong, wrong_then_right
from quantkit.errors import RequestError
from quantkit.runtime.core.output import FinishReason
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.speculative.metrics import SpecMetrics
from quantkit.runtime.speculative.ngram import NgramProposer
from quantkit.runtime.speculative.proposer import Proposer

PROPOSERS: dict[str, Callable[[], Proposer]] = {
    "right": lambda: Guesser(right),
    "wrong": lambda: Guesser(wrong),
    "mixed": lambda: Guesser(mixed, whole=False),
    "wrong-then-right": lambda: Guesser(wrong_then_right),
    "ngram": NgramProposer,
}


def engine(
    proposer: Proposer | None,
    model: FakeModel | None = None,
    max_batch: int = 8,
    budget: int = 64,
    caching: bool = True,
    draft_len: int | None = 4,
    **kwargs: object,
) -> Engine:
    config = EngineConfig(max_batch, budget, caching, draft_len)
    return Engine(model or FakeModel(), config, decode=decode, proposer=proposer, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_blocks", "max_batch", "budget"),
    [(64, 1, 64), (64, 8, 64), (64, 8, 8), (64, 3, 5), (12, 8, 16), (11, 4, 4), (11, 1, 1)],
    ids=["alone", "batch", "chunks", "small-chunks", "preemption", "no-room", "one-token"],
)
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "plain"])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_greedy_output_is_the_models(proposer: str, num_blocks: int, max_batch: int, budget: int, caching: bool) -> None:
    model = FakeModel(num_blocks)
    running = engine(PROPOSERS[proposer](), model, max_batch, budget, caching)
    for _ in ("cold", "warm"):
        ids = [running.add(request) for request in requests()]
        outputs = drain(running)
        for request_id, prompt in zip(ids, PROMPTS, strict=True):
            assert tokens_of(outputs, request_id) == expected(prompt, 12)
    assert max(tokens for _, tokens in model.batches) <= budget


@pytest.mark.parametrize("proposer", ["right", "wrong", "mixed"])
def test_logits_that_are_no_numbers_fail_a_request_where_they_do_without_drafts(proposer: str) -> None:
    """After a draft token they count only if the text gets there; the tokens accepted before are the model's."""
    texts = [expected(prompt, 12) for prompt in PROMPTS]
    for token in (texts[2][5], (texts[3][4] + 1) % VOCAB):
        model = FakeModel()
        model.spoil = {token: math.nan}
        running = engine(PROPOSERS[proposer](), model)
        ids = [running.add(request) for request in requests()]
        outputs = []
        while running.has_work:
            outputs += running.step()
            running.check()
        for request_id, prompt, text in zip(ids, PROMPTS, texts, strict=True):
            fails = token in [prompt[-1], *text[:-1]]
            until = [prompt[-1], *text].index(token) if fails else 12
            assert tokens_of(outputs, request_id) == text[:until]
            (last,) = [out for out in outputs if out.request_id == request_id and out.finish_reason is not None]
            assert last.finish_reason == (FinishReason.ERROR if fails else FinishReason.LENGTH)


def test_right_drafts_save_steps_and_wrong_ones_cost_none() -> None:
    steps = {}
    for name, proposer in (("off", None), ("right", Guesser(right)), ("wrong", Guesser(wrong))):
        running = engine(proposer)
        running.generate([Request(PROMPTS[3], SamplingParams(temperature=0, max_tokens=21))])
        steps[name] = running.stats.steps
    # The prompt's step gives one token; then 20 come one by one, or five at a time.
    assert steps == {"off": 21, "right": 5, "wrong": 21}


def test_the_last_token_is_not_drafted() -> None:
    model, proposer = FakeModel(), Guesser(right)
    running = engine(proposer, model)
    (out,) = running.generate([Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=4))])
    assert len(out.token_ids) == 4
    # Three tokens are left: two are drafted, and the third follows them.
    assert model.batches == [(1, 3), (1, 3)]
    assert proposer.drafted == proposer.accepted_tokens == 2


def test_a_step_mixes_drafts_prompts_and_plain_sequences() -> None:
    model = FakeModel()
    running = engine(Guesser(right), model, budget=12)
    first = running.add(Request(PROMPTS[1], GREEDY))
    running.step()
    second = running.add(Request(PROMPTS[5], SamplingParams(seed=3, max_tokens=12)))
    outputs = running.step()
    running.check()
    # Prompts come first: 1 + 11 tokens leave nothing for a draft. Then 1 + 5 do.
    assert model.batches[-1] == (2, 12)
    outputs = running.step()
    running.check()
    assert model.batches[-1] == (2, 1 + 4 + 5)
    assert [(out.request_id, len(out.token_ids)) for out in outputs] == [(first, 5), (second, 1)]


def test_drafts_take_no_block_from_others() -> None:
    """Two sequences fill a pool to the last block: drafts get shorter, and none is preempted."""
    model = FakeModel(num_blocks=8, block_size=4)
    running = engine(Guesser(wrong), model, caching=False)
    for start in (0, 40):
        running.add(Request(list(range(start, start + 8)), SamplingParams(temperature=0, max_tokens=9)))
    while running.has_work:
        running.step()
        running.check()
    assert running.stats.preemptions == 0
    stats = running.stats.speculation
    assert stats is not None
    assert stats.accepted == 0
    # Both would have drafted 4 tokens in each of most of their 8 steps.
    assert 8 < stats.drafted < 2 * 8 * 4


def test_what_a_rejected_draft_was_given_is_free_again_after_the_step() -> None:
    running, plain = engine(Guesser(wrong), draft_len=15), engine(None)
    for each in (running, plain):
        each.add(Request(PROMPTS[6], SamplingParams(temperature=0, max_tokens=20)))
    while running.has_work:
        running.step()
        plain.step()
        assert running.stats.used_blocks == plain.stats.used_blocks


def test_only_accepted_tokens_reach_the_prefix_cache() -> None:
    running = engine(Guesser(mixed))
    prompt = list(range(6))
    (out,) = running.generate([Request(prompt, SamplingParams(temperature=0, max_tokens=30))])
    (again,) = running.generate([Request(prompt + out.token_ids, GREEDY)])
    # 36 tokens, of which all but the last were computed. It is the same number if the run ends in the middle of a draft.
    assert again.usage.cached == 32
    assert again.token_ids == expected(prompt, 42)[30:]


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("num_blocks", [64, 14], ids=["room", "preemption"])
def test_samples_share_blocks_and_copy_what_drafts_write(proposer: str, num_blocks: int) -> None:
    running = engine(PROPOSERS[proposer](), FakeModel(num_blocks))
    running.add(Request(PROMPTS[5][:10], SamplingParams(n=4, temperature=0, max_tokens=30)))
    outputs = drain(running)
    assert (running.stats.preemptions > 0) == (num_blocks == 14)
    assert all(tokens_of(outputs, 0, index) == expected(PROMPTS[5][:10], 30) for index in range(4))


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_a_seed_gives_the_text_that_it_gives_without_drafts(proposer: str) -> None:
    params = [
        SamplingParams(seed=5, max_tokens=20),
        SamplingParams(seed=6, max_tokens=20, temperature=0.3, top_k=30, n=2),
        SamplingParams(seed=7, max_tokens=20, temperature=0.2, top_p=0.8, min_p=0.01, repetition_penalty=1.3),
    ]
    cases = [Request(prompt, each) for prompt, each in itertools.product(PROMPTS, params)]
    wanted = [out.token_ids for request in cases for out in engine(None).generate([request])]
    for num_blocks, max_batch, budget in ((64, 8, 64), (14, 8, 20)):
        running = engine(PROPOSERS[proposer](), FakeModel(num_blocks), max_batch, budget)
        found = running.generate(cases)
        assert [out.token_ids for out in found] == wanted


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_logprobs_of_every_token(proposer: str) -> None:
    for params in (
        SamplingParams(temperature=0, max_tokens=12, logprobs=3),
        SamplingParams(seed=1, max_tokens=12, temperature=0.2, top_k=50, repetition_penalty=1.5, logprobs=2),
    ):
        (wanted,) = engine(None).generate([Request(PROMPTS[2], params)])
        (found,) = engine(PROPOSERS[proposer]()).generate([Request(PROMPTS[2], params)])
        assert found.token_ids == wanted.token_ids
        for mine, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
            assert mine.token == theirs.token
            # A row of a batch is summed in another order.
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("at", range(5, 16))
def test_stop_strings_inside_an_accepted_run(include: bool, at: int) -> None:
    tokens = expected(PROMPTS[4], 40)
    text = decode(tokens)
    stop = text[at : at + 3]
    where = text.index(stop)
    running = engine(Guesser(right), draft_len=6)
    params = SamplingParams(temperature=0, max_tokens=40, stop=(stop,), include_stop=include)
    running.add(Request(PROMPTS[4], params))
    outputs = drain(running)
    assert "".join(out.text for out in outputs) == text[: where + 3 * include]
    assert tokens_of(outputs, 0) == tokens[: where + 3]
    assert (outputs[-1].finish_reason, outputs[-1].stop) == (FinishReason.STOP, stop)


@pytest.mark.parametrize("place", range(1, 12))
def test_end_of_sequence_inside_an_accepted_run(place: int) -> None:
    tokens = expected(PROMPTS[4], 40)
    first = tokens.index(tokens[place]) + 1
    running = engine(Guesser(right), draft_len=6, eos_token_ids=[tokens[place]])
    running.add(Request(PROMPTS[4], SamplingParams(temperature=0, max_tokens=40)))
    outputs = drain(running)
    assert tokens_of(outputs, 0) == tokens[:first]
    assert (outputs[-1].finish_reason, outputs[-1].stop) == (FinishReason.STOP, tokens[place])


def test_lengths_end_at_the_context() -> None:
    for proposer in PROPOSERS.values():
        running = engine(proposer(), FakeModel(max_model_len=20))
        (out,) = running.generate([Request(PROMPTS[6], SamplingParams(temperature=0, max_tokens=50))])
        assert out.token_ids == expected(PROMPTS[6], 3)
        running = engine(proposer(), FakeModel(num_blocks=3))
        (out,) = running.generate([Request(PROMPTS[3], SamplingParams(temperature=0, max_tokens=None))])
        assert out.token_ids == expected(PROMPTS[3], 8)


def test_a_failed_step_leaves_nothing_of_its_drafts() -> None:
    model = FakeModel()
    running = engine(Guesser(right), model)
    bad = running.add(Request(PROMPTS[3], GREEDY))
    running.step()
    model.fail = expected(PROMPTS[3], 3)[2]  # a token of the draft
    outputs = running.step()
    running.check()
    assert [(out.request_id, out.finish_reason) for out in outputs] == [(bad, FinishReason.ERROR)]
    assert running.stats.used_blocks == 0
    model.fail = None
    (again,) = running.generate([Request(PROMPTS[3], GREEDY)])
    assert again.token_ids == expected(PROMPTS[3], 12)


def test_numbers_add_up() -> None:
    running = engine(Guesser(right), draft_len=3)
    running.generate([Request(PROMPTS[3], SamplingParams(temperature=0, max_tokens=9))])
    stats = running.stats.speculation
    assert stats is not None
    # Eight tokens after the first: two whole drafts, each with one more token.
    assert (stats.drafts, stats.drafted, stats.accepted) == (2, 6, 6)
    assert (stats.acceptance_rate, stats.mean_accepted_length) == (1.0, 4.0)
    assert stats.acceptance_by_position == [1.0, 1.0, 1.0]
    assert stats.cost_ratio is not None
    assert stats.cost_ratio > 0
    running = engine(Guesser(wrong), draft_len=3)
    running.generate([Request(PROMPTS[3], SamplingParams(temperature=0, max_tokens=9))])
    stats = running.stats.speculation
    assert stats is not None
    # Seven of the last eight tokens can be drafted; the drafts end where the text does.
    assert (stats.drafts, stats.drafted, stats.accepted) == (7, 3 * 5 + 2 + 1, 0)
    assert (stats.acceptance_rate, stats.mean_accepted_length) == (0.0, 1.0)
    assert stats.speed_up is None  # no step without drafts to compare with
    assert engine(None).stats.speculation is None


@pytest.mark.parametrize("guess", [right, wrong])
def test_the_speed_up_is_over_steps_without_drafts(monkeypatch: pytest.MonkeyPatch, guess: Callable[..., int]) -> None:
    model = FakeModel()
    running = engine(Guesser(guess), model, draft_len=None)
    monkeypatch.setattr("time.perf_counter", lambda: float(len(model.batches)))  # A forward takes a second, a draft none.
    running.generate([Request(PROMPTS[3], SamplingParams(temperature=0, max_tokens=60))])
    stats = running.stats.speculation
    assert stats is not None
    assert stats.drafted > 0
    # Not counted: the prompt's step, and six steps of one token each after which the cost of a step is known.
    assert stats.speed_up == pytest.approx((60 - 7) / (len(model.batches) - 7))
    assert stats.speed_up is not None
    assert (stats.speed_up > 2) == (guess is right)


def test_what_disturbs_plain_steps_disturbs_the_others_too() -> None:
    tally = SpecMetrics()
    tally.plain(0.0, 0.9, None)  # before it is known what a step takes
    tally.plain(0.2, 1.0, 1.0)
    assert tally.stats().speed_up == 1.0
    tally.compare(1.2, 2.0)
    assert tally.stats().speed_up == pytest.approx((1.2 + 2.4) / 2.4)


@pytest.mark.parametrize("draft_len", [0, -1, 16])
def test_draft_lengths_have_bounds(draft_len: int) -> None:
    with pytest.raises(RequestError, match=f"draft_len is {draft_len}, it must be between 1 and 15"):
        EngineConfig(draft_len=draft_len)


def _random_proposer(draw: random.Random) -> Proposer:
    guess = draw.choice([right, wrong, mixed, wrong_then_right])
    proposers: list[Proposer] = [Guesser(guess, whole=draw.random() < 0.5), NgramProposer(), Drawer(VOCAB)]
    return draw.choice(proposers)


@pytest.mark.parametrize("seed", range(40))
def test_random_arrivals_and_cancellations_in_small_pools(seed: int) -> None:
    draw = random.Random(seed)
    model = FakeModel(draw.randint(6, 20), draw.choice([1, 2, 4, 8]), max_model_len=64)
    max_batch = draw.randint(1, 6)
    budget = draw.randint(max_batch, 40)
    running = engine(_random_proposer(draw), model, max_batch, budget, draw.random() < 0.7, draw.choice([None, 1, 3, 15]))
    held = min(model.num_blocks * model.block_size, model.max_model_len - 1)
    wanted: dict[int, tuple[list[int], int]] = {}
    found: dict[tuple[int, int], list[int]] = {}
    arrivals = 20
    while arrivals or running.has_work:
        while arrivals and draw.random() < 0.4:
            length = draw.randint(1, held)
            count = draw.randint(1, max(1, min(12, held - length + 1)))
            prompt = [(draw.choice([0, 50]) + i) % VOCAB for i in range(length)]
            samples = draw.randint(1, max_batch) if draw.random() < 0.3 else 1
            # A greedy sequence is never drawn for; one that samples must end, with its length.
            temperature = draw.choice([0.0, 0.0, 0.5])
            params = SamplingParams(temperature=temperature, max_tokens=count, n=samples, seed=1)
            request_id = running.add(Request(prompt, params))
            wanted[request_id] = prompt, count if temperature == 0 else -count
            arrivals -= 1
        if wanted and draw.random() < 0.05:
            running.cancel(draw.choice(list(wanted)))
            running.check()
        for out in running.step():
            assert out.error is None
            tokens = found.setdefault((out.request_id, out.index), [])
            tokens += out.token_ids
            prompt, count = wanted[out.request_id]
            assert len(tokens) <= abs(count)
            if count > 0:
                assert tokens == expected(prompt, count)[: len(tokens)]
            if out.finish_reason is FinishReason.LENGTH:
                assert len(tokens) == abs(count)
        running.check()
    assert running.stats.used_blocks == 0
    assert max(tokens for _, tokens in model.batches) <= budget
