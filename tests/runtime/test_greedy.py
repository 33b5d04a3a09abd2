"""Greedy output is the same token for token alone, in any batch, with chunked prefill, after preemption and with a warm cache.

In float32, where the order of sums is all that a batch may change.
"""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from quantkit.runtime.engine import Engine, EngineConfig
from quantkit.runtime.paged_model import CacheOptions, open_model
from quantkit.runtime.request import Request, SamplingParams

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PROMPTS = [
    torch.randint(3, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 7, 16, 33, 90, 150)
]


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model: plain attention; windows and full attention in turn; norms on queries and keys."""
    return tiny.make_model(tmp_path_factory.mktemp("greedy") / "model", request.param)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    """What transformers generates for each prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]


def engine(folder: Path, config: EngineConfig, tokens: int = 4096) -> Engine:
    per_token = 3 * 2 * 2 * 16 * 4
    options = CacheOptions(memory=tokens * per_token, block_size=4, dtype=torch.float32)
    return Engine(open_model(folder, torch.device("cpu"), options), config)


def generated(engine: Engine, order: list[int]) -> dict[int, list[int]]:
    outputs = engine.generate([Request(PROMPTS[index], GREEDY) for index in order])
    engine.check()
    return dict(zip(order, (output.token_ids for output in outputs), strict=True))


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(max_batch=1),
        EngineConfig(max_batch=6),
        EngineConfig(max_batch=3, token_budget=11, prefix_caching=False),
        EngineConfig(max_batch=6, token_budget=64),
    ],
)
def test_any_batch_and_any_chunks(folder: Path, alone: list[list[int]], config: EngineConfig) -> None:
    found = generated(engine(folder, config), [4, 0, 5, 2, 1, 3])
    assert [found[index] for index in range(len(PROMPTS))] == alone


def test_a_warm_prefix_cache(folder: Path, alone: list[list[int]]) -> None:
    warm = engine(folder, EngineConfig(max_batch=4))
    generated(warm, [5, 4, 3])
    found = generated(warm, [3, 5, 4])
    assert {index: alone[index] for index in (3, 4, 5)} == found
    assert warm.stats.prefix_hits > 200


def test_preemption(folder: Path, alone: list[list[int]]) -> None:
    """A cache that holds one and a half of the longest: most sequences are thrown out and computed again."""
    tight = engine(folder, EngineConfig(max_batch=6, prefix_caching=False), tokens=260)
    found = generated(tight, [3, 2, 4, 1, 0, 5])
    assert [found[index] for index in range(len(PROMPTS))] == alone
    assert tight.stats.preemptions > 0


def test_samples_share_the_prompt_and_part_where_they_differ(folder: Path) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=4, ignore_eos=True)
    together = engine(folder, EngineConfig(max_batch=4)).generate([Request(PROMPTS[3], params)])
    again = engine(folder, EngineConfig(max_batch=4, token_budget=9)).generate([Request(PROMPTS[3], params)])
    assert [output.token_ids for output in together] == [output.token_ids for output in again]
    assert len({str(output.token_ids) for output in together}) == 4
