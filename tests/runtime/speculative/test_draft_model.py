"""A draft model with its own cache. Both it and the target reveal every wrong slot."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import product
from random import Random

import pytest
import torch
from torch import Tensor

from helpers.engine_runs import GREEDY, PROMPTS, requests, tokens_of
from helpers.exact import chi_square, probabilities
from helpers.fake_model import VOCAB, FakeModel, expected, logits_after
from helpers.sequences import numbered  # noqa: F401
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.core.output import FinishReason, Output
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.speculative.draft_model import DraftModel


class Wrong(FakeModel):
    """Never right."""

    def forward(self, batch: Batch) -> Tensor:
        """See `Model`."""
        return super().forward(batch).roll(1, -1)


class Doubtful(FakeModel):
    """Two of three tokens are right."""

    def forward(self, batch: Batch) -> Tensor:
        """See `Model`."""
        logits = super().forward(batch)
        wrong = logits.argmax(-1) % 3 == 0 if len(logits) else torch.zeros(0, dtype=torch.bool)
        logits[wrong] = logits[wrong].roll(1, -1)
        return logits


def flawed() -> FakeModel:
    """Its logits are NaN after every third token."""
    model = FakeModel(256)
    model.spoil = dict.fromkeys(range(0, VOCAB, 3), math.nan)
    return model


def pair(
    draft: FakeModel, model: FakeModel | None = None, max_batch: int = 8, budget: int = 64, draft_len: int | None = 4
) -> tuple[Engine, DraftModel]:
    target = model or FakeModel()
    drafter = DraftModel(draft, target.vocab_size)
    return Engine(target, EngineConfig(max_batch, budget, draft_len=draft_len), proposer=drafter), drafter


def drain(running: Engine, drafter: DraftModel) -> list[Output]:
    """Run to the end, with both integrity checks after every step; returns all outputs."""
    outputs = []
    while running.has_work:
        outputs += running.step()
        running.check()
        drafter.check()
    for out in outputs:
        if out.error is not None:
            raise out.error
    assert not drafter._shadows
    assert drafter._kv.pool.num_free == len(drafter._kv.pool)
    return outputs


DRAFTS: dict[str, Callable[[], FakeModel]] = {
    "right": lambda: FakeModel(256),
    "doubtful": lambda: Doubtful(256),
    "small-blocks": lambda: Doubtful(300, block_size=2),
    "no-room": lambda: Doubtful(10),
    "short-context": lambda: Doubtful(256, max_model_len=19),
    "wider": lambda: FakeModel(256, vocab_size=VOCAB + 3),
    "flawed": flawed,
    "narrower": lambda: FakeModel(256, vocab_size=VOCAB - 7),
}


@pytest.mark.parametrize(
    ("num_blocks", "max_batch", "budget"),
    [(64, 1, 64), (64, 8, 64), (64, 3, 5), (12, 8, 16), (11, 4, 4)],
    ids=["alone", "batch", "chunks", "preemption", "no-room"],
)
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_output_is_the_models(draft: str, num_blocks: int, max_batch: int, budget: int) -> None:
    running, drafter = pair(DRAFTS[draft](), FakeModel(num_blocks), max_batch, budget)
    for _ in ("cold", "warm"):
        ids = [running.add(request) for request in requests()]
        outputs = drain(running, drafter)
        for request_id, prompt in zip(ids, PROMPTS, strict=True):
            assert tokens_of(outputs, request_id) == expected(prompt, 12)
    stats = running.stats.speculation
    assert stats is not None
    assert stats.drafted > 0
    assert stats.acceptance_rate is not None
    if draft == "right":
        assert stats.acceptance_rate == 1
    if draft in ("doubtful", "small-blocks"):
        assert 0.2 < stats.acceptance_rate < 0.9


def test_what_it_computes() -> None:
    """The prompt, then one token at a time; after a draft that was accepted entirely, the two tokens that are missing."""
    draft = FakeModel()
    running, drafter = pair(draft, draft_len=3)
    running.add(Request(PROMPTS[3], SamplingParams(temperature=0, max_tokens=9)))
    drain(running, drafter)
    # 5 tokens of the prompt and the first one; two more; then, of the 4 that came out, the last two are missing.
    assert draft.batches == [(1, 6), (1, 1), (1, 1), (1, 2), (1, 1), (1, 1)]
    wrong = Wrong()
    running, drafter = pair(wrong, draft_len=3)
    running.add(Request([95, 96, 95], SamplingParams(temperature=0, max_tokens=5)))
    drain(running, drafter)
    stats = running.stats.speculation
    assert stats is not None
    assert stats.accepted == 0
    # Four more tokens, and drafts of 3, 2 and 1; rejected tokens are overwritten.
    assert wrong.batches == [(1, 4)] + [(1, 1)] * 5


def test_a_token_that_the_drafter_does_not_have_ends_the_drafts() -> None:
    """The sequences that hold it get no drafts; the others in the step do."""
    sizes = []

    class Narrow(FakeModel):
        def forward(self, batch: Batch) -> Tensor:
            assert int(batch.token_ids.max()) < self.vocab_size, "no such row in the embedding"
            sizes.append(len(batch.seq_lens))
            return super().forward(batch)

    prompts = [[3, VOCAB - 1, 4], [1, 2], [VOCAB - 9]]  # The last texts continue through the token that the model lacks.
    running, drafter = pair(Narrow(256, vocab_size=VOCAB - 7))
    ids = [running.add(Request(prompt, GREEDY)) for prompt in prompts]
    outputs = drain(running, drafter)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(outputs, request_id) == expected(prompt, 12)
    assert 0 < max(sizes) < 3


def test_a_known_prefix_is_not_computed_again() -> None:
    draft = FakeModel()
    running, drafter = pair(draft)
    prompt = list(range(16))
    running.add(Request(prompt, GREEDY))
    drain(running, drafter)
    draft.batches.clear()
    running.add(Request([*prompt, 90], GREEDY))
    drain(running, drafter)
    assert draft.batches[0] == (1, 2)


def test_long_prompts_come_in_chunks() -> None:
    draft, model = FakeModel(256, 4, 512), FakeModel(256, 4, 512)
    running, drafter = pair(draft, model, budget=400)
    prompt = [(3 * i) % VOCAB for i in range(300)]
    request_id = running.add(Request(prompt, GREEDY))
    assert tokens_of(drain(running, drafter), request_id) == expected(prompt, 12)
    assert draft.batches[:3] == [(1, 128), (1, 128), (1, 45)]


@pytest.mark.parametrize("num_blocks", [64, 14], ids=["room", "preemption"])
@pytest.mark.parametrize("draft", ["right", "doubtful", "no-room"])
def test_samples_of_one_prompt(draft: str, num_blocks: int) -> None:
    running, drafter = pair(DRAFTS[draft](), FakeModel(num_blocks))
    running.add(Request(PROMPTS[5][:10], SamplingParams(n=4, temperature=0, max_tokens=30)))
    outputs = drain(running, drafter)
    assert (running.stats.preemptions > 0) == (num_blocks == 14)
    assert all(tokens_of(outputs, 0, index) == expected(PROMPTS[5][:10], 30) for index in range(4))


@pytest.mark.parametrize("seed", range(20))
def test_cancelled_and_failed_requests_leave_no_blocks(seed: int) -> None:
    draw = Random(seed)
    model = FakeModel(draw.randint(12, 40))
    running, drafter = pair(Doubtful(draw.randint(8, 64)), model, 4, 16, draw.choice([None, 2, 5]))
    wanted: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}
    arrivals = 14
    while arrivals or running.has_work:
        if arrivals and draw.random() < 0.5:
            prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 30))]
            wanted[running.add(Request(prompt, SamplingParams(temperature=0, max_tokens=draw.randint(1, 10))))] = prompt
            arrivals -= 1
        if wanted and draw.random() < 0.1:
            running.cancel(draw.choice(list(wanted)))
        model.fail = draw.randrange(VOCAB) if draw.random() < 0.05 else None
        for out in running.step():
            found.setdefault(out.request_id, []).extend(out.token_ids)
            tokens = found[out.request_id]
            assert tokens == expected(wanted[out.request_id], len(tokens))
            assert out.finish_reason is not FinishReason.ERROR or str(out.error) == "out of memory, say"
        running.check()
        drafter.check()
    assert running.stats.used_blocks == 0
    assert not drafter._shadows
    assert drafter._kv.pool.num_free == len(drafter._kv.pool)


class Other(FakeModel):
    """Another distribution over the same tokens."""

    def forward(self, batch: Batch) -> Tensor:
        """See `Model`."""
        logits = super().forward(batch)
        return 0.6 * logits + 0.4 * logits.roll(1, -1)


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.85, "presence_penalty": 0.5}], ids=str)
def test_samples_are_distributed_as_without_drafts(filters: dict[str, float]) -> None:
    vocab, count, prompt = 4, 1500, [2, 1]
    params = SamplingParams(temperature=3.0, max_tokens=4, **filters)  # type: ignore[arg-type]

    def exact(output: tuple[int, ...]) -> list[float]:
        logits = logits_after([*prompt, *output], vocab)
        logits[list(set(output))] -= params.presence_penalty
        return probabilities(logits, params).tolist()

    wanted: dict[tuple[int, ...], float] = {}
    for text in product(range(vocab), repeat=4):
        wanted[text] = 1.0
        for i, token in enumerate(text):
            wanted[text] *= exact(text[:i])[token]
    running, _ = pair(Other(256, 4, vocab_size=vocab), FakeModel(256, 4, vocab_size=vocab), 32, 256, draft_len=2)
    outputs = running.generate([Request(prompt, params) for _ in range(count)])
    statistic, bound = chi_square(Counter(tuple(out.token_ids) for out in outputs), wanted)
    assert statistic < bound
    stats = running.stats.speculation
    assert stats is not None
    assert stats.acceptance_rate is not None
    assert 0.3 < stats.acceptance_rate < 0.95
