"""Eviction within a budget, on a model whose logits reveal every token that it sees: which tokens a token sees depends on its
position alone."""

import random
import re
from collections import abc

import pytest

from helpers.fake_model import VOCAB
from helpers.held_model import HeldModel, expected, visible
from helpers.sequences import sequence
from quantkit.errors import QuantkitError, RequestError
from quantkit.runtime.core.output import FinishReason
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.core.sequence import Draft, Sequence
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache.block_manager import BlockManager
from quantkit.runtime.kv_cache.eviction import POLICIES, Budget, Eviction, check_windows
from quantkit.runtime.kv_cache.options import CacheOptions

TEXT = [(11 * i + i // 7) % VOCAB for i in range(200)]


def chosen(policy: str, blocks: int, size: int = 4) -> Eviction:
    found = Budget(policy, blocks * size).eviction(size)
    assert found is not None
    return found


def greedy(prompt: list[int], count: int, n: int = 1) -> Request:
    return Request(prompt, SamplingParams(temperature=0, max_tokens=count, n=n))


def kept(policy: str, blocks: int, length: int) -> list[int]:
    """Positions that the last of `length` tokens sees."""
    return [position for position, _ in visible(TEXT[:length], chosen(policy, blocks), 4)[-1]]


def test_window_keeps_the_newest_blocks() -> None:
    assert kept("window", 5, 20) == list(range(20))
    assert kept("window", 5, 21) == list(range(4, 21))
    # Of sixteen blocks, two are evicted at a time.
    assert kept("window", 16, 65) == list(range(8, 65))
    assert kept("window", 16, 72) == list(range(8, 72))
    assert kept("window", 16, 73) == list(range(16, 73))


def test_sinks_keeps_the_first_block_and_the_newest() -> None:
    assert kept("sinks", 5, 21) == [*range(4), *range(8, 21)]
    assert kept("sinks", 16, 150) == [*range(4), *range(92, 150)]


def test_scored_keeps_sinks_recent_blocks_and_those_with_the_largest_scores() -> None:
    six = chosen("scored", 6)
    # The first block and the last three are pinned; of equal scores the older is evicted.
    assert six.drop([0.0, 5.0, 4.0, 0.0, 0.0, 0.0]) == [2]
    assert six.drop([0.0, 1.0, 1.0, 0.0, 0.0, 0.0]) == [1]
    assert chosen("scored", 16).drop([float(i % 3) for i in range(16)]) == [3, 6]


@pytest.mark.parametrize("blocks", range(3, 60))
@pytest.mark.parametrize("policy", POLICIES)
def test_every_budget_drops_a_stride_that_is_neither_pinned_nor_recent(policy: str, blocks: int) -> None:
    one = chosen(policy, blocks)
    dropped = one.drop([1.0] * blocks)
    assert dropped == sorted(set(dropped))
    assert len(dropped) == one.stride >= 1
    assert one.policy.sinks <= dropped[0]
    assert dropped[-1] < blocks - one.recent


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_longer_than_memory_is_served_within_a_budget(policy: str) -> None:
    model, six = HeldModel(num_blocks=6, max_model_len=400), chosen(policy, 6)
    running = Engine(model, EngineConfig(max_batch=1, token_budget=64, eviction=six))
    (out,) = running.generate([greedy(TEXT, 30)])
    assert out.token_ids == expected(TEXT, 30, six, 4)
    # The first chunk fills the budget; then come chunks of one block.
    assert [tokens for _, tokens in model.batches[:3]] == [24, 4, 4]
    assert running.stats.evicted_blocks == 57 - 6 + 1
    with pytest.raises(RequestError, match="KV memory holds 24 tokens, this request needs up to 229"):
        Engine(model, EngineConfig(max_batch=1)).add(greedy(TEXT, 30))
    # A budget that is larger than memory does not help.
    with pytest.raises(RequestError, match="KV memory holds 24 tokens, this request needs up to 229"):
        Engine(model, EngineConfig(max_batch=1, eviction=chosen(policy, 7))).add(greedy(TEXT, 30))


def test_without_max_tokens_only_the_context_ends_it() -> None:
    config = EngineConfig(max_batch=1, eviction=chosen("window", 3))
    running = Engine(HeldModel(num_blocks=3, max_model_len=90), config)
    (out,) = running.generate([Request([1, 2], SamplingParams(max_tokens=None))])
    assert len(out.token_ids) == 88


def test_a_text_within_the_budget_is_left_alone() -> None:
    one = Engine(HeldModel(), EngineConfig(max_batch=4, eviction=chosen("sinks", 8)))
    full = Engine(HeldModel(), EngineConfig(max_batch=4))
    requests = [greedy(TEXT[:length], 6) for length in (1, 10, 26)]
    assert [out.token_ids for out in one.generate(requests)] == [out.token_ids for out in full.generate(requests)]
    assert one.stats.evicted_blocks == 0


def _run(kv: BlockManager, one: Sequence, count: int) -> None:
    """Compute `count` further tokens of a sequence that has blocks."""
    for token in TEXT[len(one.tokens) : len(one.tokens) + count]:
        one.tokens.append(token)
        assert kv.evict_to_budget(one) >= 1
        assert kv.extend(one, 1)
        kv.commit(one, 1)
        kv.check([one])


def test_what_a_sequence_drops_is_free_at_once_and_what_it_published_stays_known() -> None:
    kv = BlockManager(12, 4, prefix_caching=True, eviction=chosen("window", 3))
    one = sequence(TEXT[:4])
    kv.commit(one, kv.admit(one, budget=100, reserve=0))
    _run(kv, one, 36)
    assert (len(one.blocks), kv.pool.num_free, one.evicted) == (3, 9, list(range(7)))
    # Three blocks were published before the first eviction. Later blocks are not published, because their tokens saw less.
    assert len(kv.prefix_cache) == 3
    assert one.num_published == 3
    # A prompt with the same start finds two of them: the last block of a budget is always computed.
    other = sequence(TEXT[:40], request_id=1)
    assert kv.admit(other, budget=100, reserve=0) == 4
    assert other.num_computed == 8
    kv.check([one, other])


def test_dropping_a_shared_block_leaves_it_to_the_others() -> None:
    kv = BlockManager(12, 4, prefix_caching=True, eviction=chosen("sinks", 4))
    parent, child = sequence(TEXT[:14]), sequence(TEXT[:14], index=1)
    kv.commit(parent, kv.admit(parent, budget=100, reserve=0))
    kv.fork(parent, child)
    shared = parent.blocks[1]
    for _ in range(3):
        parent.tokens.append(5)
        assert kv.evict_to_budget(parent) >= 1
        assert kv.extend(parent, 1)
        kv.commit(parent, 1)
        kv.check([parent, child])
    assert parent.evicted == [1]
    assert shared not in parent.blocks
    assert shared in child.blocks
    assert kv.pool.references[shared] == 1
    assert parent.logical_blocks == [0, 2, 3, 4]
    kv.release(parent)
    assert (parent.evicted, parent.num_held) == ([], 0)
    kv.check([parent, child])


def _random_request(draw: random.Random, max_batch: int) -> tuple[Request, int]:
    length, count = draw.randint(1, 60), draw.randint(1, 30)
    prompt = TEXT[draw.choice([0, 50]) :][:length]
    if draw.random() < 0.3:
        prompt[draw.randrange(length)] = draw.randrange(VOCAB)
    return greedy(prompt, count, draw.randint(1, max_batch) if draw.random() < 0.3 else 1), count


@pytest.mark.parametrize("seed", range(60))
def test_any_batch_chunks_preemption_forks_and_cancellation_leave_every_text_its_own(seed: int) -> None:
    draw = random.Random(seed)
    size, max_batch = draw.choice([1, 2, 4]), draw.randint(1, 6)
    dropping = chosen(draw.choice(list(POLICIES)), draw.randint(3, 12), size)
    model = HeldModel(dropping.blocks + draw.randint(0, 20), size, max_model_len=100)
    config = EngineConfig(max_batch, draw.randint(max_batch, 24), draw.random() < 0.7, eviction=dropping)
    running = Engine(model, config)
    wanted: dict[int, tuple[Request, int]] = {}
    found: dict[tuple[int, int], list[int]] = {}
    arrivals, steps, cancelled = 16, 0, 0
    while arrivals or running.has_work:
        while arrivals and draw.random() < 0.4:
            request, count = _random_request(draw, max_batch)
            arrivals -= 1
            wanted[running.add(request)] = request, count
        if draw.random() < 0.03 and running.has_work:
            cancelled += running.cancel(draw.choice(list(wanted)))
            running.check()
        for output in running.step():
            assert output.error is None
            tokens = found.setdefault((output.request_id, output.index), [])
            tokens.extend(output.token_ids)
            if output.finish_reason is not None:
                request, count = wanted[output.request_id]
                whole = expected(request.prompt, count, dropping, size)
                assert tokens == whole[: len(tokens)]
                assert output.finish_reason is FinishReason.CANCELLED or len(tokens) == count
        running.check()
        steps += 1
        assert steps < 10_000
    assert len({request_id for request_id, _ in found}) >= 16 - cancelled
    assert running.stats.used_blocks == 0


class Guesses:
    """Drafts whose first tokens, a random number of them, are right; implements `Proposer`."""

    def __init__(self, draw: random.Random, dropping: Eviction, size: int) -> None:
        self._draw, self._dropping, self._size = draw, dropping, size
        self.accepted_tokens = 0

    def propose(self, wanted: abc.Sequence[tuple[Sequence, int]]) -> list[Draft]:
        """See `Proposer`."""
        return [Draft(self._guess(list(one.tokens), count)) for one, count in wanted]

    def _guess(self, tokens: list[int], count: int) -> list[int]:
        right = self._draw.randint(0, count)
        return [*expected(tokens, right, self._dropping, self._size), *(5 for _ in range(count - right))]

    def accepted(self, sequence: Sequence, count: int) -> None:
        """See `Proposer`."""
        self.accepted_tokens += count

    def backlog(self, sequence: Sequence) -> int:
        """See `Proposer`."""
        return 0

    def released(self, sequence: Sequence) -> None:
        """See `Proposer`."""


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("policy", POLICIES)
def test_drafts_change_nothing_and_stay_within_the_budget(policy: str, seed: int) -> None:
    draw, size = random.Random(seed), 4
    dropping = chosen(policy, draw.randint(3, 9), size)
    guesses = Guesses(draw, dropping, size)
    config = EngineConfig(3, 24, eviction=dropping, draft_len=draw.randint(1, 7))
    running = Engine(HeldModel(dropping.blocks + 9, size, max_model_len=100), config, proposer=guesses)
    requests = [_random_request(draw, 3)[0] for _ in range(6)]
    for request in requests:
        running.add(request)
    found: dict[tuple[int, int], list[int]] = {}
    while running.has_work:
        for output in running.step():
            assert output.error is None
            found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        running.check()
    for (request_id, _), tokens in found.items():
        request = requests[request_id]
        assert tokens == expected(request.prompt, request.params.max_tokens or 0, dropping, size)
    assert guesses.accepted_tokens > 0


def test_the_random_runs_drop_preempt_and_find_prefixes() -> None:
    # The premise of the test above.
    draw, dropping = random.Random(1), chosen("sinks", 4)
    running = Engine(HeldModel(10, 4, max_model_len=100), EngineConfig(5, 24, eviction=dropping))
    running.generate([_random_request(draw, 5)[0] for _ in range(30)])
    assert running.stats.preemptions > 0
    assert running.stats.prefix_hits > 0
    assert running.stats.evicted_blocks > 100


@pytest.mark.parametrize(
    ("policy", "budget", "message"),
    [
        ("lru", 100, "--kv-policy lru: there is no such policy; use full, window, sinks, scored"),
        ("window", None, "--kv-policy window needs to know how many tokens to keep; add --kv-budget TOKENS"),
        ("full", 100, "--kv-budget needs a policy that drops tokens; add --kv-policy window, sinks, scored"),
        ("sinks", 47, "--kv-budget 47 is less than 3 blocks of 16 tokens; give 48 or more"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(policy: str, budget: int | None, message: str) -> None:
    with pytest.raises(QuantkitError, match=f"^{re.escape(message)}$"):
        Budget(policy, budget).eviction(16)
    assert Budget().eviction(16) is None


@pytest.mark.parametrize(("dtype", "size"), [("auto", 16), ("int8", 16), ("int4", 32), ("int4+4", 32)])
def test_a_cache_is_not_asked_for_with_less_than_its_policy_needs(dtype: str, size: int) -> None:
    """Checked before a model is loaded."""
    with pytest.raises(QuantkitError, match=f"^--kv-budget {3 * size - 1} is less than 3 blocks of {size} tokens; give"):
        CacheOptions(dtype=dtype, budget=Budget("sinks", 3 * size - 1))
    assert CacheOptions(dtype=dtype, budget=Budget("sinks", 3 * size))


def test_windows_of_layers_must_end_among_the_recent_blocks() -> None:
    check_windows(chosen("window", 3), 4, 1000)
    check_windows(chosen("sinks", 8), 4, 16)
    message = "--kv-policy: the model has layers with a window of 17 tokens, and only the newest 16 are kept without gaps"
    with pytest.raises(RequestError, match=f"^{re.escape(message)}; use --kv-policy window or a --kv-budget of 40 or more$"):
        check_windows(chosen("sinks", 8), 4, 17)
    check_windows(chosen("scored", 10), 4, 17)
    model = HeldModel()
    model.sliding_window = 17
    with pytest.raises(RequestError, match="kept without gaps"):
        Engine(model, EngineConfig(eviction=chosen("scored", 8)))
