"""Real attention under eviction: the engine's logits equal those of full attention under a mask of the evicted tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import tiny
from helpers.held_model import visible
from helpers.masked import masked_forward
from quantkit.errors import RequestError
from quantkit.evaluation.paged import paged_logits, scored_text
from quantkit.kernels.attention_mass import attention_mass
from quantkit.kernels.reference import paged_attention
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache.eviction import Budget, Eviction
from quantkit.runtime.kv_cache.offload import KVOffload
from quantkit.runtime.kv_cache.options import CacheOptions, OffloadOptions
from quantkit.runtime.model.model_runner import ModelRunner, open_model

BLOCK, BUDGET = 4, 64
TOKENS = torch.randint(3, tiny.VOCAB, (200,), generator=torch.Generator().manual_seed(5)).tolist()

# Sums over at most 64 keys and 128 channels in float32, in another order than the reference's; logits are of order 1 to 10.
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 2e-3}


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with full attention everywhere, and one with alternating windows of 32 tokens and full attention."""
    return tiny.make_model(tmp_path_factory.mktemp("eviction") / "model", request.param)


def opened(folder: Path, blocks: int = 16) -> ModelRunner:
    """A model whose cache holds no more than one budget."""
    per_token = 3 * 2 * 2 * 16 * 4
    options = CacheOptions(
        memory=blocks * BLOCK * per_token, block_size=BLOCK, dtype=torch.float32, budget=Budget("window", BUDGET)
    )
    return open_model(folder, torch.device("cpu"), options)


def chosen(policy: str) -> Eviction:
    found = Budget(policy, BUDGET).eviction(BLOCK)
    assert found is not None
    return found


def mask(seen: list[list[tuple[int, int]]]) -> Tensor:
    """The attention mask, bool [T, T]: the tokens that each token sees."""
    out = torch.zeros(len(seen), len(seen), dtype=torch.bool)
    for row, held in enumerate(seen):
        out[row, [position for position, _ in held]] = True
    return out


@pytest.mark.parametrize("policy", ["window", "sinks"])
def test_logits_are_those_of_masked_full_attention(folder: Path, policy: str) -> None:
    dropping, model = chosen(policy), opened(folder)
    seen = mask(visible(TOKENS, dropping, BLOCK))
    wanted, _ = masked_forward(folder, TOKENS, seen, model.sliding_window)
    full, _ = masked_forward(folder, TOKENS, torch.ones_like(seen).tril(), model.sliding_window)
    assert not torch.allclose(wanted[BUDGET:].float(), full[BUDGET:].float(), **CLOSE)  # The mask makes a difference.
    for chunk in (512, 3):
        found = torch.cat(list(paged_logits(model, scored_text(TOKENS), dropping, chunk=chunk)))
        torch.testing.assert_close(found, wanted.float(), **CLOSE)


@pytest.mark.parametrize("policy", ["window", "sinks"])
def test_generated_tokens_follow_the_masked_model_in_any_batch(folder: Path, policy: str) -> None:
    prompts = [TOKENS[:length] for length in (150, 20, 90)]
    requests = [Request(prompt, SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)) for prompt in prompts]
    config = EngineConfig(max_batch=3, token_budget=24, eviction=chosen(policy))
    running = Engine(opened(folder, blocks=28), config)
    outputs = running.generate(requests)
    running.check()
    assert running.stats.preemptions > 0
    for prompt, out in zip(prompts, outputs, strict=True):
        text = [*prompt, *out.token_ids]
        logits, _ = masked_forward(folder, text, mask(visible(text, chosen(policy), BLOCK)), running.model.sliding_window)
        rows = logits[len(prompt) - 1 : -1]
        # The best token, unless the lead is less than rounding.
        assert float((rows.amax(-1) - rows[torch.arange(30), out.token_ids]).max()) < 2e-3


def test_windows_wider_than_the_recent_blocks_are_refused(folder: Path) -> None:
    model = opened(folder)
    small = Budget("sinks", 60).eviction(BLOCK)
    assert chosen("sinks").recent * BLOCK == 32
    assert model.sliding_window in (0, 32)
    assert (model.sliding_window == 32) == (model.loaded.config.model_type == "gemma3_text")
    if model.sliding_window:
        with pytest.raises(RequestError, match="a window of 32 tokens, and only the newest 28 are kept without gaps"):
            Engine(model, EngineConfig(eviction=small))


@pytest.mark.parametrize("fast", [True, False])
def test_scored_drops_what_the_newest_queries_look_at_least(folder: Path, fast: bool) -> None:
    """Against attention weights in float64: the mask that follows from the evicted blocks, and the mass that chose them."""
    dropping, model, sequence = chosen("scored"), opened(folder), scored_text(TOKENS)
    if not fast:
        model.backends = model.backends[-1:]  # through transformers' definition
    kept: list[list[int]] = []
    masses: dict[int, list[float]] = {}
    logits = []
    for part in paged_logits(model, sequence, dropping):
        logits.append(part)
        blocks = sequence.logical_blocks
        for row in range(sequence.num_computed - len(part), sequence.num_computed):
            kept.append([p for block in blocks for p in range(block * BLOCK, (block + 1) * BLOCK) if p <= row])
        if sequence.mass:
            masses[sequence.num_computed - 1] = sequence.mass
    seen = mask([[(position, 0) for position in row] for row in kept])
    wanted, weights = masked_forward(folder, TOKENS, seen, model.sliding_window)
    torch.testing.assert_close(torch.cat(logits), wanted.float(), **CLOSE)
    # The budget is full at token 63, and again every two blocks.
    assert sorted(masses) == list(range(BUDGET - 1, 200, 2 * BLOCK))
    total = torch.stack(weights).sum((0, 1))
    scores: dict[int, float] = {}
    for position, mass in masses.items():
        blocks = sorted({p // BLOCK for p in kept[position]})
        reference = [float(total[position, block * BLOCK : (block + 1) * BLOCK].sum()) for block in blocks]
        # 3 layers of 4 heads, each of which sums to 1 in float32.
        assert mass == pytest.approx(reference, abs=1e-4)
        scores = {block: 0.5 * scores.get(block, 0.0) + new for block, new in zip(blocks, reference, strict=True)}
        if position + 1 < len(kept):
            gone = sorted(set(blocks) - {p // BLOCK for p in kept[position + 1]})
            assert gone == sorted(sorted(blocks[1 : 16 - 8], key=scores.__getitem__)[:2])
            scores = {block: score for block, score in scores.items() if block not in gone}


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_mass_is_attention_summed_over_heads_and_blocks(softcap: float, window: int, with_sinks: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    keys, query = torch.randn(9, 4, 2, 8, generator=draw), torch.randn(3, 6, 8, generator=draw).double()
    keys[0] = float("nan")  # after the ends of the shorter sequences
    table, lengths = torch.tensor([[3, 1, 7, 2], [5, 6, 0, 0], [4, 0, 0, 0]], dtype=torch.int32), torch.tensor([15, 8, 1])
    sinks = torch.randn(6, generator=draw) if with_sinks else None
    options = {"scale": 0.3, "window": window, "softcap": softcap, "sinks": sinks}
    found = attention_mass(query, keys, table, lengths.int(), **options)  # type: ignore[arg-type]
    for row, length in enumerate(lengths.tolist()):
        for head in range(6):
            rows = keys[table[row].long(), :, head // 3].reshape(-1, 8)[:length].double()
            # Each value is one-hot for its block, so attention returns the mass of each block.
            cache = torch.zeros(9, 4, 1, 4)
            for place in range(length):
                cache[table[row, place // 4], place % 4, 0, place // 4] = 1
            one = torch.zeros(9, 4, 1, 8, dtype=torch.float64)
            one[table[row, : -(-length // 4)].long()] = torch.cat([rows, rows.new_zeros(-length % 4, 8)]).view(-1, 4, 1, 8)
            of_head = None if sinks is None else sinks[head : head + 1]
            wanted = paged_attention(
                query[row : row + 1, head : head + 1],
                one,
                cache,
                table[row : row + 1],
                torch.tensor([0, 1], dtype=torch.int32),
                lengths[row : row + 1].int(),
                **{**options, "sinks": of_head},  # type: ignore[arg-type]
            )
            found[row] -= wanted[0, 0]
    # float64 on both sides.
    assert float(found.abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4", "int4+4"])
@pytest.mark.parametrize("policy", ["sinks", "scored"])
def test_quantized_caches_evict_and_offload_alike_in_any_batch(folder: Path, policy: str, dtype: str) -> None:
    """What a token sees depends on its position alone: the text is the same alone, in a batch, and after fetched blocks."""
    budget = Budget(policy, BUDGET)
    requests = [
        Request(TOKENS[:length], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)) for length in (140, 50, 90)
    ]

    def run(max_batch: int, blocks: int, rounds: int = 1) -> tuple[list[list[int]], Engine]:
        options = CacheOptions(max_model_len=200, max_batch=max_batch, block_size=BLOCK, dtype=dtype, budget=budget)
        model = open_model(folder, torch.device("cpu"), options)
        model.num_blocks = min(model.num_blocks, blocks)
        offload = KVOffload(model.cache, OffloadOptions(1 << 22))
        config = EngineConfig(max_batch=max_batch, token_budget=24, eviction=budget.eviction(BLOCK))
        running = Engine(model, config, offload=offload)
        for _ in range(rounds):
            outputs = running.generate(requests)
            running.check()
        return [out.token_ids for out in outputs], running

    alone, _ = run(1, 16)
    together, tight = run(3, 28, rounds=2)
    assert together == alone
    offload = tight.stats.offload
    assert offload is not None
    assert offload.fetched > 0
    assert tight.stats.evicted_blocks > 0
