"""Random arrivals and cancellations in pools that are far too small: no request is lost, and none waits forever."""

import random
from dataclasses import dataclass

import pytest

from helpers.fake_model import VOCAB, FakeModel, expected
from quantkit.runtime.core.output import FinishReason
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig


@dataclass
class Expectation:
    """The output that a request must give, and the step by which it must end."""

    prompt: list[int]
    count: int
    samples: int
    deadline: int
    cancelled: bool = False


def _random_engine(draw: random.Random) -> tuple[FakeModel, Engine]:
    block_size = draw.choice([1, 2, 4, 8])
    model = FakeModel(draw.randint(6, 20), block_size, max_model_len=64)
    max_batch = draw.randint(1, 6)
    config = EngineConfig(max_batch, draw.randint(max_batch, 24), prefix_caching=draw.random() < 0.7)
    return model, Engine(model, config)


def _random_request(draw: random.Random, model: FakeModel, max_batch: int) -> tuple[Request, int]:
    """A greedy request that fits in the pool alone. There are few different texts, so that prefixes are shared."""
    held = min(model.num_blocks * model.block_size, model.max_model_len - 1)
    length = draw.randint(1, held)
    count = draw.randint(1, max(1, min(12, held - length + 1)))
    base = draw.choice([0, 50])
    prompt = [(base + i) % VOCAB for i in range(length)]
    if draw.random() < 0.3:
        prompt[draw.randrange(length)] = draw.randrange(VOCAB)
    samples = draw.randint(1, max_batch) if draw.random() < 0.3 else 1
    return Request(prompt, SamplingParams(temperature=0, max_tokens=count, n=samples)), count


def _steps_alone(request: Request, count: int) -> int:
    """Upper bound on the steps of a request once it is the oldest: every step advances its oldest sample by at least one
    token, and at worst that sample was just preempted."""
    return request.params.n * (len(request.prompt) + count)


@pytest.mark.parametrize("seed", range(60))
def test_every_request_ends_in_bounded_time_with_its_own_tokens(seed: int) -> None:
    draw = random.Random(seed)
    model, running = _random_engine(draw)
    max_batch = running._config.max_batch
    open_requests: dict[int, Expectation] = {}
    found: dict[tuple[int, int], list[int]] = {}
    step, arrivals, horizon = 0, 24, 0
    while arrivals or running.has_work:
        while arrivals and draw.random() < 0.4:
            request, count = _random_request(draw, model, max_batch)
            arrivals -= 1
            # Older requests come first: their bounds add up.
            horizon = max(horizon, step) + _steps_alone(request, count)
            request_id = running.add(request)
            open_requests[request_id] = Expectation(list(request.prompt), count, request.params.n, horizon)
        if open_requests and draw.random() < 0.05:
            victim = draw.choice(list(open_requests))
            assert running.cancel(victim)
            open_requests[victim].cancelled = True
            running.check()
        for output in running.step():
            key = output.request_id, output.index
            found.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is None:
                continue
            wanted = open_requests[output.request_id]
            assert output.finish_reason is (FinishReason.CANCELLED if wanted.cancelled else FinishReason.LENGTH)
            tokens = found.pop(key)
            assert tokens == expected(wanted.prompt, wanted.count)[: len(tokens)]
            assert wanted.cancelled or len(tokens) == wanted.count
            wanted.samples -= 1
            if wanted.samples == 0:
                del open_requests[output.request_id]
        running.check()
        step += 1
        late = [request_id for request_id, wanted in open_requests.items() if wanted.deadline < step]
        assert not late, f"requests {late} are starved"
    assert not open_requests
    assert not found
    assert max(sequences for sequences, _ in model.batches) <= max_batch
    assert max(tokens for _, tokens in model.batches) <= running._config.token_budget
    assert running.stats.used_blocks == 0


def test_the_random_pools_are_small_enough_to_matter() -> None:
    # The premise of the test above: at least some of its runs preempt.
    preempted = 0
    for seed in range(12):
        draw = random.Random(seed)
        model, running = _random_engine(draw)
        running.generate([_random_request(draw, model, running._config.max_batch)[0] for _ in range(10)])
        preempted += running.stats.preemptions > 0
    assert preempted >= 3
