"""Greedy output is the same alone, in any batch, with chunked prefill, after preemption and with a warm prefix cache.

In float32: a batch changes only the order of sums.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import tiny
from helpers.greedy import GREEDY, PROMPTS
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import ModelRunner, open_model
from quantkit.runtime.speculative.draft_model import DraftModel
from quantkit.runtime.speculative.ngram import NgramProposer
from quantkit.runtime.speculative.proposer import Proposer


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models: full attention; sliding windows and full attention in turn; norms on queries and keys."""
    return tiny.make_model(tmp_path_factory.mktemp("greedy") / "model", request.param)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    """The reference: what transformers generates for each prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]


def engine(folder: Path, config: EngineConfig, tokens: int = 4096, proposer: Proposer | None = None) -> Engine:
    return Engine(small_model(folder, tokens), config, proposer=proposer)


def small_model(folder: Path, tokens: int = 4096) -> ModelRunner:
    per_token = 3 * 2 * 2 * 16 * 4
    options = CacheOptions(memory=tokens * per_token, block_size=4, dtype=torch.float32)
    return open_model(folder, torch.device("cpu"), options)


def proposer_of(name: str, folder: Path, almost: Path) -> Proposer:
    """Prompt lookup, the model itself as a draft model, or a draft model that is often right."""
    if name == "ngram":
        return NgramProposer()
    return DraftModel(small_model(folder if name == "itself" else almost), tiny.VOCAB)


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


def test_bfloat16_weights(tmp_path: Path) -> None:
    """In steps of 150 tokens as well as of one; and wherever the inputs of bfloat16 weights are rounded, they always are."""
    half = tiny.make_model(tmp_path / "model", dtype=torch.bfloat16)
    one = generated(engine(half, EngineConfig(max_batch=1, token_budget=1, prefix_caching=False)), [0, 1, 2, 3, 4, 5])
    for config in (EngineConfig(max_batch=1), EngineConfig(max_batch=6), EngineConfig(max_batch=3, token_budget=11)):
        assert generated(engine(half, config), [4, 0, 5, 2, 1, 3]) == one


def test_a_warm_prefix_cache(folder: Path, alone: list[list[int]]) -> None:
    warm = engine(folder, EngineConfig(max_batch=4))
    generated(warm, [5, 4, 3])
    found = generated(warm, [3, 5, 4])
    assert {index: alone[index] for index in (3, 4, 5)} == found
    assert warm.stats.prefix_hits > 200


def test_preemption(folder: Path, alone: list[list[int]]) -> None:
    """The cache holds one and a half times the longest sequence: most sequences are preempted and computed again."""
    tight = engine(folder, EngineConfig(max_batch=6, prefix_caching=False), tokens=260)
    found = generated(tight, [3, 2, 4, 1, 0, 5])
    assert [found[index] for index in range(len(PROMPTS))] == alone
    assert tight.stats.preemptions > 0


@pytest.fixture(scope="module")
def almost(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with noise on its weights, so that it agrees with the model on some tokens only."""
    out = tmp_path_factory.mktemp("almost") / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("name", ["ngram", "itself", "almost"])
@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (EngineConfig(max_batch=1, draft_len=4), 4096),
        (EngineConfig(max_batch=6, draft_len=7), 4096),
        (EngineConfig(max_batch=3, token_budget=11, draft_len=3), 4096),
        (EngineConfig(max_batch=6, prefix_caching=False, draft_len=4), 260),
        (EngineConfig(max_batch=6), 4096),
    ],
    ids=["alone", "batch", "chunks", "preemption", "auto"],
)
def test_speculation(folder: Path, almost: Path, alone: list[list[int]], name: str, config: EngineConfig, tokens: int) -> None:
    """With a cold prefix cache, then with a warm one."""
    running = engine(folder, config, tokens, proposer_of(name, folder, almost))
    for order in ([4, 0, 5, 2, 1, 3], [3, 2, 5, 4, 0, 1]):
        found = generated(running, order)
        assert [found[index] for index in range(len(PROMPTS))] == alone
    stats = running.stats.speculation
    assert stats is not None
    if config.draft_len is not None:
        assert stats.drafted > 0
        assert name != "itself" or stats.accepted == stats.drafted


def test_samples_share_the_prompt_and_part_where_they_differ(folder: Path) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=4, ignore_eos=True)
    together = engine(folder, EngineConfig(max_batch=4)).generate([Request(PROMPTS[3], params)])
    again = engine(folder, EngineConfig(max_batch=4, token_budget=9)).generate([Request(PROMPTS[3], params)])
    assert [output.token_ids for output in together] == [output.token_ids for output in again]
    assert len({str(output.token_ids) for output in together}) == 4
