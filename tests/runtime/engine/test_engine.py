"""The engine with a model that exposes every wrong slot, block or position: its outputs, their order, and what it frees."""

import itertools
import math
import re
from typing import Any

import pytest

from helpers.engine_runs import GREEDY, PROMPTS, decode, drain, requests, tokens_of
from helpers.fake_model import VOCAB, FakeModel, expected, logits_after
from quantkit.errors import NumericsError, RequestError
from quantkit.runtime.core.output import FinishReason, Output
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig


def engine(
    model: FakeModel | None = None, max_batch: int = 8, budget: int = 64, caching: bool = True, **kwargs: object
) -> Engine:
    config = EngineConfig(max_batch=max_batch, token_budget=budget, prefix_caching=caching)
    return Engine(model or FakeModel(), config, decode=decode, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_blocks", "max_batch", "budget"),
    [(64, 1, 64), (64, 8, 64), (64, 8, 8), (64, 3, 5), (12, 8, 16), (11, 4, 4), (11, 1, 1)],
    ids=["alone", "batch", "chunks", "small-chunks", "preemption", "no-room", "one-token"],
)
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "plain"])
def test_greedy_output_is_the_models_however_it_is_scheduled(
    num_blocks: int, max_batch: int, budget: int, caching: bool
) -> None:
    running = engine(FakeModel(num_blocks), max_batch, budget, caching)
    for _ in ("cold", "warm"):
        ids = [running.add(request) for request in requests()]
        outputs = drain(running)
        for request_id, prompt in zip(ids, PROMPTS, strict=True):
            assert tokens_of(outputs, request_id) == expected(prompt, 12)
    # The small pools have evicted every prefix before it is needed again.
    assert (running.stats.prefix_hits > 0) == (caching and num_blocks == 64)


def test_small_pools_do_preempt_and_chunks_are_chunks() -> None:
    # The premise of the test above.
    running = engine(FakeModel(12), 8, 16)
    running.generate(requests())
    assert running.stats.preemptions > 0
    model = FakeModel()
    engine(model, 8, 8).generate([Request(PROMPTS[7], GREEDY)])
    assert model.batches[:5] == [(1, 8), (1, 8), (1, 8), (1, 6), (1, 1)]


def test_decodes_come_first_and_prompts_get_the_rest_in_order_of_arrival() -> None:
    model = FakeModel()
    running = engine(model, 8, 10)
    first = running.add(Request([1, 2, 3], GREEDY))
    running.step()
    second, third = (running.add(Request(prompt, GREEDY)) for prompt in (list(range(16)), list(range(40, 47))))
    outputs = [running.step() for _ in range(3)]
    # One token per step goes to the first request, nine to prompts: 9 of the second; its other 7 and 2 of the third; then 5.
    assert model.batches == [(1, 3), (2, 10), (3, 10), (3, 7)]
    assert [[out.request_id for out in step] for step in outputs] == [[first], [first, second], [first, second, third]]


def test_admission_leaves_every_running_sequence_its_next_block() -> None:
    # Two requests of three blocks each run in a pool of eight; a third one would leave one free block for both and must wait.
    model = FakeModel(num_blocks=8)
    running = engine(model, caching=False)
    for start, length in ((0, 12), (20, 12), (40, 4), (60, 1)):
        running.add(Request(list(range(start, start + length)), SamplingParams(temperature=0, max_tokens=5)))
    running.step()
    # 3 + 3 blocks are held; with 1 more, 1 free block would remain for two sequences.
    assert (running.stats.running, running.stats.waiting, running.stats.used_blocks) == (2, 2, 6)
    drain(running)
    assert running.stats.preemptions == 0


def test_a_known_prefix_is_not_computed_again_but_the_last_token_is() -> None:
    model = FakeModel()
    running = engine(model)
    prompt = list(range(16))
    running.generate([Request(prompt, GREEDY)])
    model.batches.clear()
    for text, computed, cached in (
        (prompt, 4, 12),
        ([*prompt, 5], 1, 16),
        ([*prompt[:9], 90, 91], 3, 8),
        ([9, *prompt], 17, 0),
    ):
        (out,) = running.generate([Request(text, GREEDY)])
        assert out.token_ids == expected(text, 12)
        assert out.usage == (len(text), cached, 12)
        assert model.batches[0] == (1, computed)
        model.batches.clear()


def test_generated_blocks_are_known_too() -> None:
    running = engine()
    prompt = list(range(6))
    (out,) = running.generate([Request(prompt, GREEDY)])
    (again,) = running.generate([Request(prompt + out.token_ids, GREEDY)])
    # 18 tokens, and the last one was never computed: 4 full blocks.
    assert again.usage.cached == 16
    assert again.token_ids == expected(prompt, 24)[12:]


def test_samples_share_the_prompt_and_copy_the_block_they_write() -> None:
    model = FakeModel()
    running = engine(model)
    prompt = list(range(10))
    running.add(Request(prompt, SamplingParams(n=4, max_tokens=8, seed=3)))
    outputs = running.step()
    running.check()
    assert model.batches == [(1, 10)]
    assert [(out.index, out.usage) for out in outputs] == [(i, (10, 0, 1)) for i in range(4)]
    assert running.stats.used_blocks == 3
    outputs += running.step()
    running.check()
    # Two full blocks are shared. Each sample has its own third block: three copies; the last sample keeps the original.
    assert running.stats.used_blocks == 2 + 4
    outputs += drain(running)
    texts = [tokens_of(outputs, 0, index) for index in range(4)]
    assert len({tuple(text) for text in texts}) == 4
    alone = engine().generate([Request(prompt, SamplingParams(n=4, max_tokens=8, seed=3))])
    assert [out.token_ids for out in alone] == texts


def test_greedy_samples_are_equal_even_when_they_are_preempted() -> None:
    # Four samples of 10 + 30 tokens are 40 blocks; 14 force preemption of samples that have split off.
    running = engine(FakeModel(14))
    running.add(Request(PROMPTS[5][:10], SamplingParams(n=4, temperature=0, max_tokens=30)))
    outputs = drain(running)
    assert running.stats.preemptions > 0
    assert all(tokens_of(outputs, 0, index) == expected(PROMPTS[5][:10], 30) for index in range(4))


def test_seeded_samples_do_not_depend_on_the_batch() -> None:
    params = [
        SamplingParams(seed=5, max_tokens=20),
        SamplingParams(seed=6, max_tokens=20, temperature=2.0, top_k=30, n=2),
        SamplingParams(seed=7, max_tokens=20, top_p=0.8, min_p=0.01, frequency_penalty=0.5, repetition_penalty=1.3),
    ]
    wanted = [[out.token_ids for out in engine().generate([Request(prompt, each)])] for prompt in PROMPTS for each in params]
    all_requests = [Request(prompt, each) for prompt in PROMPTS for each in params]
    for num_blocks, max_batch, budget in ((64, 8, 64), (14, 8, 9)):
        found = engine(FakeModel(num_blocks), max_batch, budget).generate(all_requests)
        assert [out.token_ids for out in found] == list(itertools.chain.from_iterable(wanted))


def test_cancelling_frees_blocks_at_once_and_says_so_once() -> None:
    running = engine(max_batch=2)
    samples = running.add(Request(PROMPTS[6], SamplingParams(n=2, seed=1)))
    waits = running.add(Request(PROMPTS[7], GREEDY))
    running.step()
    running.step()
    assert (running.stats.running, running.stats.waiting) == (2, 1)
    assert running.cancel(waits)
    assert running.cancel(samples)
    running.check()
    assert running.stats.used_blocks == running.stats.running == running.stats.waiting == 0
    assert not running.cancel(samples)
    assert not running.cancel(99)
    outputs = running.step()
    assert [(out.request_id, out.index, out.finish_reason) for out in outputs] == [
        (waits, 0, "cancelled"),
        (samples, 0, "cancelled"),
        (samples, 1, "cancelled"),
    ]
    assert outputs[1].usage == (17, 0, 2)
    assert not running.has_work


def test_cancelling_before_samples_split_off_ends_all_of_them() -> None:
    running = engine(budget=8)
    running.add(Request(PROMPTS[7], SamplingParams(n=3)))
    running.step()
    running.cancel(0)
    running.check()
    assert [(out.index, out.finish_reason) for out in drain(running)] == [(i, FinishReason.CANCELLED) for i in range(3)]


def test_a_failed_step_ends_the_requests_in_it_and_no_others() -> None:
    model = FakeModel()
    running = engine(model, max_batch=2)
    bad = running.add(Request([1, 2, 96, 4], SamplingParams(n=2, temperature=0)))
    good = running.add(Request(PROMPTS[3], GREEDY))
    model.fail = 96
    outputs = running.step()
    running.check()
    assert [(out.request_id, out.index, out.finish_reason) for out in outputs] == [(bad, 0, "error"), (bad, 1, "error")]
    assert str(outputs[0].error) == "out of memory, say"
    model.fail = None
    assert tokens_of(drain(running), good) == expected(PROMPTS[3], 12)
    # No token of the failed step was committed.
    (again,) = running.generate([Request([1, 2, 96, 4, 5], GREEDY)])
    assert again.usage.cached == 0


@pytest.mark.parametrize(("value", "named"), [(math.nan, "NaN"), (math.inf, "Inf")])
def test_logits_that_are_no_numbers_end_their_request_and_no_other(value: float, named: str) -> None:
    model = FakeModel()
    token = next(each for each in range(VOCAB) if not any(each in prompt + expected(prompt, 12) for prompt in PROMPTS))
    model.spoil = {token: value}
    running = engine(model, max_batch=16, budget=128)
    good = [running.add(request) for request in requests()]
    bad = running.add(Request([1, 2, 3, 4, token], SamplingParams(n=2, temperature=0)))
    outputs = running.step()
    running.check()
    ended = [out for out in outputs if out.finish_reason is not None]
    assert [(out.request_id, out.index, out.finish_reason) for out in ended] == [(bad, 0, "error"), (bad, 1, "error")]
    assert isinstance(ended[0].error, NumericsError)
    assert re.fullmatch(f"request {bad}: the model's logits after token 5 are {named}, so no token .*", str(ended[0].error))
    outputs += drain(running)
    for request_id, prompt in zip(good, PROMPTS, strict=True):
        assert tokens_of(outputs, request_id) == expected(prompt, 12)
    # No block of the failed request was published.
    (again,) = running.generate([Request([1, 2, 3, 4, 5], GREEDY)])
    assert again.usage.cached == 0


def test_a_request_fails_where_its_own_text_gets_to() -> None:
    texts = [expected(prompt, 12) for prompt in PROMPTS[3:5]]
    token = next(token for token in texts[0][3:] if token not in texts[1] + texts[0][:3])
    model = FakeModel()
    model.spoil = {token: math.nan}
    running = engine(model)
    first, second = (running.add(Request(prompt, GREEDY)) for prompt in PROMPTS[3:5])
    outputs = []
    while running.has_work:
        outputs += running.step()
        running.check()
    assert tokens_of(outputs, first) == texts[0][: texts[0].index(token) + 1]
    assert tokens_of(outputs, second) == texts[1]
    assert [out.finish_reason for out in outputs if out.finish_reason] in (["error", "length"], ["length", "error"])
    assert running.stats.used_blocks == 0


def test_generate_raises_what_failed_and_leaves_nothing() -> None:
    model = FakeModel()
    model.fail = PROMPTS[1][0]
    running = engine(model, max_batch=1)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        running.generate(requests())
    running.check()
    assert not running.has_work
    assert running.stats.used_blocks == 0


def test_ends_of_sequences() -> None:
    prompt = PROMPTS[4]
    tokens = expected(prompt, 40)
    end = tokens[5]
    first = tokens.index(end) + 1
    running = engine(eos_token_ids=[end])

    def one(**kwargs: object) -> Output:
        (out,) = running.generate([Request(prompt, SamplingParams(temperature=0, max_tokens=40, **kwargs))])  # type: ignore[arg-type]
        return out

    for params in ({}, {"ignore_eos": True, "stop_token_ids": (end,)}):
        out = one(**params)
        assert (out.finish_reason, out.stop, out.token_ids) == (FinishReason.STOP, end, tokens[:first])
        assert out.text == decode(tokens[: first - 1])
    assert one(include_stop=True).text == decode(tokens[:first])
    out = one(ignore_eos=True)
    assert (out.finish_reason, out.stop, out.token_ids, out.text) == (FinishReason.LENGTH, None, tokens, decode(tokens))


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_the_text_and_not_the_tokens(include: bool) -> None:
    tokens = expected(PROMPTS[4], 40)
    text = decode(tokens)
    stop = text[7:10]
    where = text.index(stop)
    params = SamplingParams(temperature=0, max_tokens=40, stop=("no such text", stop), include_stop=include)
    running = engine()
    running.add(Request(PROMPTS[4], params))
    outputs = drain(running)
    assert "".join(out.text for out in outputs) == text[: where + 3 * include]
    assert tokens_of(outputs, 0) == tokens[: where + 3]
    assert (outputs[-1].finish_reason, outputs[-1].stop) == (FinishReason.STOP, stop)


def test_text_that_might_become_a_stop_string_comes_out_when_the_sequence_ends_otherwise() -> None:
    text = decode(expected(PROMPTS[4], 10))
    params = SamplingParams(temperature=0, max_tokens=10, stop=(text[8:] + "never",))
    running = engine()
    running.add(Request(PROMPTS[4], params))
    outputs = [out.text for out in drain(running)]
    assert "".join(outputs) == text
    assert outputs[-1][-2:] == text[8:]


def test_lengths_end_at_the_context() -> None:
    (out,) = engine(FakeModel(max_model_len=20)).generate([Request(PROMPTS[6], SamplingParams(temperature=0, max_tokens=50))])
    assert (out.finish_reason, len(out.token_ids)) == (FinishReason.LENGTH, 3)
    # Without max_tokens, it also ends at the end of KV memory: 3 blocks hold 12 tokens; the thirteenth is never stored.
    (out,) = engine(FakeModel(num_blocks=3)).generate([Request(PROMPTS[3], SamplingParams(temperature=0, max_tokens=None))])
    assert out.token_ids == expected(PROMPTS[3], 8)


def test_logprobs_are_the_models_own() -> None:
    prompt = PROMPTS[2]
    params = SamplingParams(seed=1, max_tokens=6, temperature=0.7, top_k=50, repetition_penalty=1.5, logprobs=3)
    (out,) = engine().generate([Request(prompt, params)])
    assert [each.token for each in out.logprobs] == out.token_ids
    for i, each in enumerate(out.logprobs):
        wanted = logits_after([*prompt, *out.token_ids[:i]]).log_softmax(-1)
        values, ids = wanted.topk(3)
        # float32 sums over 97 tokens, in another order.
        assert each.logprob == pytest.approx(float(wanted[each.token]), abs=1e-5)
        top: list[tuple[int, Any]] = [
            (token, pytest.approx(value, abs=1e-5)) for token, value in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        assert each.top == top


def test_logprobs_of_neighbours_do_not_mix() -> None:
    wants = [None, 0, 4, None, 2]
    outputs = engine().generate(
        [Request(PROMPTS[i], SamplingParams(temperature=0, max_tokens=3, logprobs=n)) for i, n in enumerate(wants)]
    )
    for out, n, prompt in zip(outputs, wants, PROMPTS, strict=False):
        assert out.token_ids == expected(prompt, 3)
        assert [len(each.top) for each in out.logprobs] == ([] if n is None else [n] * 3)
        assert all(each.token == token for each, token in zip(out.logprobs, out.token_ids, strict=False))


def test_times_are_in_order() -> None:
    running = engine(max_batch=1)
    outputs = running.generate(requests())
    for out in outputs:
        assert out.timing.first_token is not None
        assert out.timing.finished is not None
        assert out.timing.arrival <= out.timing.first_token <= out.timing.finished
    assert running.stats.steps == 8 * 12


REFUSED = {
    "empty": (Request([], GREEDY), "the prompt has no tokens; give at least one"),
    "negative": (
        Request([1, -2], GREEDY),
        "token -2 of the prompt is not in the vocabulary of 97; use this model's tokenizer",
    ),
    "too-large": (
        Request([VOCAB], GREEDY),
        "token 97 of the prompt is not in the vocabulary of 97; use this model's tokenizer",
    ),
    "long": (
        Request([1] * 128, GREEDY),
        "the prompt has 128 tokens and the context is 128 tokens, prompt and output together; shorten the prompt",
    ),
    "memory": (
        Request([1] * 30, SamplingParams(max_tokens=12)),
        "KV memory holds 40 tokens, this request needs up to 41; lower max_tokens or give more memory",
    ),
    "memory-open": (
        Request([1] * 41, SamplingParams(max_tokens=None)),
        "KV memory holds 40 tokens, this request needs up to 41; lower max_tokens or give more memory",
    ),
    "samples": (Request([1], SamplingParams(n=5)), "n is 5 and only 4 sequences run at a time; lower n"),
    "stop-token": (
        Request([1], SamplingParams(stop_token_ids=(3, 97))),
        "stop_token_ids has tokens outside of the vocabulary of 97; use this model's tokenizer",
    ),
    "no-text": (
        Request([1], SamplingParams(stop=("a",))),
        "stop strings need a tokenizer and this engine has none; use stop_token_ids",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_line_and_leaves_nothing(name: str) -> None:
    request, message = REFUSED[name]
    running = Engine(FakeModel(num_blocks=10), EngineConfig(max_batch=4, token_budget=8))
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        running.add(request)
    running.check()
    assert not running.has_work
    assert running.stats.used_blocks == 0
    with pytest.raises(RequestError):
        running.generate([Request([1], GREEDY), request])
    assert not running.has_work
    running.check()


def test_the_largest_request_that_fits_is_served() -> None:
    running = engine(FakeModel(num_blocks=10), budget=8, max_batch=4)
    for prompt, count in (([1] * 30, 11), ([1] * 40, 1)):
        (out,) = running.generate([Request(prompt, SamplingParams(temperature=0, max_tokens=count))])
        assert out.token_ids == expected(prompt, count)


@pytest.mark.parametrize(("max_batch", "budget"), [(0, 4), (5, 4)])
def test_a_budget_covers_the_batch(max_batch: int, budget: int) -> None:
    with pytest.raises(RequestError, match="token_budget at least max_batch"):
        EngineConfig(max_batch=max_batch, token_budget=budget)
