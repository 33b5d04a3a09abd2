"""Log probabilities of a prompt's tokens are the model's, with chunked prefill, caching, preemption and other requests."""

import math

import pytest

from helpers.fake_model import VOCAB, FakeModel, expected, logits_after
from helpers.proposers import Guesser, mixed
from quantkit.errors import NumericsError, RequestError
from quantkit.runtime.core.output import Output, TokenLogprobs
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig

PROMPTS = [[(11 * i + 5 * n) % VOCAB for i in range(length)] for n, length in enumerate((1, 2, 4, 5, 9, 16, 17, 33))]


def _check(found: list[TokenLogprobs], prompt: list[int], first: int, top: int) -> None:
    """Compare token by token with the model's logits after the tokens before it.

    The engine's numbers are float32: a sum of 97 exponentials loses a few units in the last place. Of equally likely tokens,
    any may be the last of the most likely ones.
    """
    assert [entry.token for entry in found] == prompt[first:]
    for place, entry in enumerate(found, start=first):
        logp = logits_after(prompt[:place]).double().log_softmax(-1)
        assert entry.logprob == pytest.approx(float(logp[entry.token]), abs=1e-5)
        assert len({token for token, _ in entry.top}) == top
        for (token, value), likeliest in zip(entry.top, logp.sort(descending=True).values[:top].tolist(), strict=True):
            assert value == pytest.approx(likeliest, abs=1e-5)
            assert logp[token] == likeliest


def _request(number: int, first: int = 1, top: int = 2, tokens: int = 6, n: int = 1) -> Request:
    params = SamplingParams(temperature=0, max_tokens=tokens, n=n, prompt_logprobs=top, prompt_logprobs_from=first)
    return Request(PROMPTS[number], params)


def _drain(running: Engine) -> list[Output]:
    outputs = []
    while running.has_work:
        outputs += running.step()
        running.check()
    assert running.stats.used_blocks == 0
    return outputs


@pytest.mark.parametrize(
    ("num_blocks", "max_batch", "budget"),
    [(64, 8, 64), (64, 3, 5), (12, 8, 16), (11, 1, 1)],
    ids=["batch", "small-chunks", "preemption", "one-token"],
)
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "plain"])
@pytest.mark.parametrize("proposer", [False, True], ids=["", "drafts"])
def test_they_are_the_models_however_it_is_scheduled(
    num_blocks: int, max_batch: int, budget: int, caching: bool, proposer: bool
) -> None:
    config = EngineConfig(max_batch=max_batch, token_budget=budget, prefix_caching=caching, draft_len=3)
    running = Engine(FakeModel(num_blocks), config, proposer=Guesser(mixed, whole=False) if proposer else None)
    plain = SamplingParams(temperature=0, max_tokens=6)
    for first in (1, 4, 12):
        ids = {}
        for number, prompt in enumerate(PROMPTS):
            ids[running.add(_request(number, first))] = number
            running.add(Request(prompt, plain))
        outputs = _drain(running)
        for request_id, number in ids.items():
            mine = [out for out in outputs if out.request_id == request_id]
            assert [token for out in mine for token in out.token_ids] == expected(PROMPTS[number], 6)
            assert not any(out.prompt_logprobs for out in mine[1:])
            _check(mine[0].prompt_logprobs, PROMPTS[number], first, 2)
        assert not any(out.prompt_logprobs for out in outputs if out.request_id not in ids)


def test_preemption_in_the_middle_of_a_prompt_loses_and_repeats_nothing() -> None:
    """Three long prompts in a pool that holds little more than one of them."""
    model = FakeModel(num_blocks=12)
    running = Engine(model, EngineConfig(max_batch=3, token_budget=7, prefix_caching=False))
    ids = [running.add(_request(7, tokens=12)) for _ in range(3)]
    outputs = _drain(running)
    assert running.stats.preemptions > 0
    for request_id in ids:
        (found,) = [out.prompt_logprobs for out in outputs if out.request_id == request_id and out.prompt_logprobs]
        _check(found, PROMPTS[7], 1, 2)


def test_what_needs_no_logits_comes_from_the_prefix_cache() -> None:
    model = FakeModel()
    running = Engine(model)
    running.generate([_request(7)])
    for first, cached in ((1, 0), (4, 0), (5, 4), (16, 12), (17, 16), (33, 32)):
        (out,) = running.generate([_request(7, first)])
        # The token before the first log probability must be computed: its logits are needed. Blocks have four tokens.
        assert out.usage.cached == cached == (first - 1) // 4 * 4
        _check(out.prompt_logprobs, PROMPTS[7], first, 2)


def test_every_sample_has_them() -> None:
    outputs = Engine(FakeModel(), EngineConfig(token_budget=64, max_batch=4)).generate([_request(5, n=3)])
    assert len(outputs) == 3
    for out in outputs:
        _check(out.prompt_logprobs, PROMPTS[5], 1, 2)


def test_none_of_the_likeliest() -> None:
    (out,) = Engine(FakeModel()).generate([_request(4, top=0)])
    _check(out.prompt_logprobs, PROMPTS[4], 1, 0)


class _Flawed(FakeModel):
    """The logits after token 13 are NaN."""

    def forward(self, batch):  # type: ignore[no-untyped-def]
        out = super().forward(batch)
        for row, place in enumerate(batch.logit_rows.tolist()):
            if batch.token_ids[place] == 13:
                out[row] = math.nan
        return out


def test_a_flawed_place_in_a_prompt_fails_its_request_alone() -> None:
    running = Engine(_Flawed())
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=0)
    good, bad = (running.add(Request(prompt, params)) for prompt in ([1, 2, 3, 4, 5], [1, 2, 13, 4, 5]))
    outputs = _drain(running)
    (failed,) = [out for out in outputs if out.request_id == bad]
    assert isinstance(failed.error, NumericsError)
    assert "after token 3 " in str(failed.error)
    found = [out for out in outputs if out.request_id == good]
    assert all(out.error is None for out in found)
    assert len(found[0].prompt_logprobs) == 4
    # No request asked for these logits, so no request is told.
    (out,) = running.generate([Request([1, 2, 13, 4, 5], SamplingParams(temperature=0, max_tokens=1))])
    assert out.error is None


@pytest.mark.parametrize(("name", "value"), [("prompt_logprobs", -1), ("prompt_logprobs", 21), ("prompt_logprobs_from", 0)])
def test_refused(name: str, value: int) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
