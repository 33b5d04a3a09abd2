"""Quantized caches under the engine: a text is the same alone, in a batch, in chunks, from a warm prefix cache, after
preemption and in forked samples, token for token; and blocks are as small as promised."""

from pathlib import Path

import pytest
import torch

from helpers import tiny
from quantkit.errors import ResourceError
from quantkit.kernels.cpu import library
from quantkit.runtime.core.batch import single_sequence_batch
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache.cache import KVCache
from quantkit.runtime.kv_cache.cache_format import cache_format, plain
from quantkit.runtime.kv_cache.dtype_base import LayerShape
from quantkit.runtime.kv_cache.dtypes import KV_DTYPES
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import ModelRunner, open_model, open_with_draft

CPU = torch.device("cpu")
QUANTIZED = ["fp8", "int8", "int4", "int4+4"]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PROMPTS = [
    torch.randint(3, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 7, 16, 33, 90, 150)
]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with full attention, and one that alternates windows and full attention."""
    return tiny.make_model(tmp_path_factory.mktemp("quantized") / "model", request.param)


def engine(folder: Path, dtype: str, config: EngineConfig, blocks: int = 500) -> Engine:
    layers = [LayerShape(2, 16, 16)] * 3
    form = cache_format(dtype, torch.float32, layers, CPU)
    pages = 2 * (config.max_batch + 1) + -(-config.token_budget // 8)
    options = CacheOptions(
        memory=blocks * form.block_bytes(layers, 8) + pages * form.tail_page_bytes(layers, 8),
        max_batch=config.max_batch,
        step_tokens=config.token_budget,
        block_size=8,
        dtype=dtype,
    )
    return Engine(open_model(folder, CPU, options), config)


def generated(engine: Engine, order: list[int]) -> dict[int, list[int]]:
    outputs = engine.generate([Request(PROMPTS[index], GREEDY) for index in order])
    engine.check()
    return dict(zip(order, (output.token_ids for output in outputs), strict=True))


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_any_batch_any_chunks_and_a_warm_prefix_cache(folder: Path, dtype: str) -> None:
    alone = generated(engine(folder, dtype, EngineConfig(max_batch=1)), list(range(len(PROMPTS))))
    assert alone == generated(engine(folder, dtype, EngineConfig(max_batch=6, token_budget=64)), [4, 0, 5, 2, 1, 3])
    chunked = engine(folder, dtype, EngineConfig(max_batch=3, token_budget=11))
    assert alone == generated(chunked, [4, 0, 5, 2, 1, 3])
    assert {index: alone[index] for index in (3, 4, 5)} == generated(chunked, [3, 5, 4])
    assert chunked.stats.prefix_hits > 200


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_preemption(folder: Path, dtype: str) -> None:
    """There is room for one and a half of the longest sequences, so most are preempted and computed again."""
    alone = generated(engine(folder, dtype, EngineConfig(max_batch=1)), list(range(len(PROMPTS))))
    tight = engine(folder, dtype, EngineConfig(max_batch=6, prefix_caching=False), blocks=33)
    assert alone == generated(tight, [3, 2, 4, 1, 0, 5])
    assert tight.stats.preemptions > 0


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_forked_samples_copy_what_they_share(folder: Path, dtype: str) -> None:
    """Four samples fork in the middle of a block: each continues like a single request with the same tokens."""
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, n=4, ignore_eos=True)
    together = engine(folder, dtype, EngineConfig(max_batch=4)).generate([Request(PROMPTS[3], params)])
    again = engine(folder, dtype, EngineConfig(max_batch=4, token_budget=9))
    assert [output.token_ids for output in together] == [
        output.token_ids for output in again.generate([Request(PROMPTS[3], params)])
    ]
    again.check()
    assert len({str(output.token_ids) for output in together}) == 4


@pytest.mark.parametrize("dtype", ["int4", "int4+4"])
def test_many_short_requests_never_run_out_of_tail_pages(folder: Path, dtype: str) -> None:
    """Each request leaves a tail page, and there are many more requests than pages."""
    config = EngineConfig(max_batch=3, token_budget=8, prefix_caching=False)
    small = engine(folder, dtype, config, blocks=60)
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    outputs = small.generate([Request(PROMPTS[5][:5], params) for _ in range(60)])
    small.check()
    assert len({str(output.token_ids) for output in outputs}) == 1


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_torchs_fall_back_gives_the_same_text(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order = [2, 3, 1]
    fast = generated(engine(folder, dtype, EngineConfig(max_batch=2)), order)
    monkeypatch.setattr(library, "load", lambda: None)
    assert fast == generated(engine(folder, dtype, EngineConfig(max_batch=2)), order)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    # Heads of 64 in blocks of 32: a 16-bit scale and a 16-bit minimum per 64 numbers, or per 32 numbers of a channel.
    [("bf16", 16), ("fp8", 8), ("int8", 8.5), ("int4", (5 + 4.5) / 2), ("int4+4", (9 + 8.5) / 2)],
)
def test_bytes_of_a_block(dtype: str, bits: float) -> None:
    layers = [LayerShape(3, 64, 64), LayerShape(1, 64, 64)]
    form = cache_format(dtype, torch.float32, layers, CPU)
    assert form.block_bytes(layers, 32) * 8 == 32 * 4 * 2 * 64 * bits
    cache = KVCache(layers, 5, 32, form, CPU, tail_pages=2)
    assert cache.nbytes == 5 * form.block_bytes(layers, 32) + 2 * form.tail_page_bytes(layers, 32)
    assert form.tail_page_bytes(layers, 32) == (32 * 4 * 2 * 64 * 2 if dtype.startswith("int4") else 0)


def test_auto_is_the_checkpoints_type() -> None:
    assert cache_format("auto", torch.float16, [], CPU) == plain(torch.float16)


@pytest.mark.parametrize("dtype", ["int4", "int4+4"])
def test_a_rejected_draft_leaves_no_trace(folder: Path, dtype: str) -> None:
    """Wrong tokens are written across the end of a page, then overwritten: the logits are those of a text without them."""

    def model() -> ModelRunner:
        found: ModelRunner = engine(folder, dtype, EngineConfig(max_batch=2)).model  # type: ignore[assignment]
        return found

    text = torch.tensor(PROMPTS[5])
    drafted, straight = model(), model()
    for each in (drafted, straight):
        each.forward(single_sequence_batch(text[:29], 0, each.block_size))
    for start in (29, 30):
        wrong = (text[start : start + 6] + 7) % tiny.VOCAB
        if dtype == "int4+4":
            for i in range(6):
                drafted.forward(single_sequence_batch(wrong[i : i + 1], start + i, drafted.block_size), draft=True)
        drafted.forward(single_sequence_batch(wrong, start, drafted.block_size))
    for start, stop in ((29, 31), (31, 40), (40, 41)):
        found = drafted.forward(single_sequence_batch(text[start:stop], start, drafted.block_size))
        assert torch.equal(found, straight.forward(single_sequence_batch(text[start:stop], start, straight.block_size)))


def test_a_draft_is_worth_less_than_a_verification(llama: Path) -> None:
    """The upper plane alone is the int4 cache; both together are nearer to 16 bit."""
    text, logits = torch.tensor(PROMPTS[5]), {}
    for name in ("auto", "int4", "int4+4"):
        model = open_model(llama, CPU, CacheOptions(memory=1 << 24, block_size=8, dtype=name))
        model.forward(single_sequence_batch(text[:-1], 0, model.block_size))
        logits[name] = model.forward(single_sequence_batch(text[-1:], 149, model.block_size))
        if name == "int4+4":
            logits["draft"] = model.forward(single_sequence_batch(text[-1:], 149, model.block_size), draft=True)
    errors = {name: float((found - logits["auto"]).abs().max()) for name, found in logits.items()}
    assert errors["int4+4"] < errors["int4"] / 3
    # The prompt's own keys differ from layer to layer, so the draft is near the int4 cache, not equal to it.
    assert errors["int4+4"] < errors["draft"] < 3 * errors["int4"]


@pytest.mark.parametrize(("dtype", "drafter"), [("int4", "int8"), ("int4+4", "int8"), ("fp8", "fp8"), ("auto", "float32")])
def test_a_draft_models_cache_is_not_quantized_by_pages(llama: Path, dtype: str, drafter: str) -> None:
    options = CacheOptions(memory=1 << 22, max_model_len=128, max_batch=1, step_tokens=32, dtype=dtype)
    main, small = open_with_draft(llama, llama, CPU, options)
    assert small.cache.format.name == drafter
    assert main.cache.nbytes + small.cache.nbytes <= 1 << 22


@pytest.mark.parametrize("dtype", ["auto", "int8", "int4", "int4+4"])
def test_a_model_and_its_drafter_hold_as_many_tokens(llama: Path, dtype: str) -> None:
    """Except that each rounds down to whole blocks, and the model's tail pages are subtracted first."""
    main, small = open_with_draft(llama, llama, CPU, CacheOptions(memory=1 << 22, max_model_len=256, dtype=dtype))
    assert small.cache.num_tokens < 64 * 256  # what all sequences together could use
    assert abs(main.cache.num_tokens - small.cache.num_tokens) <= 32
    assert 0.98 * (1 << 22) < main.cache.nbytes + small.cache.nbytes <= 1 << 22


def test_a_share_of_the_memory_that_is_too_small_is_named(llama: Path) -> None:
    for memory, words in (
        (1 << 20, "the model's share of 1,048,576 bytes does not hold"),
        (8000, "the model's share of 4,000"),
    ):
        with pytest.raises(ResourceError, match=f"^--kv-memory: {words}"):
            open_with_draft(llama, llama, CPU, CacheOptions(memory=memory, dtype="int4" if memory > 8000 else "auto"))
    options = CacheOptions(memory=1 << 16, max_model_len=128)
    with pytest.raises(ResourceError, match=r"^--kv-memory: the model's share of 0 MiB holds 32 tokens, one request"):
        open_with_draft(llama, llama, CPU, options)


def test_what_cannot_be_is_refused_by_name(llama: Path) -> None:
    with pytest.raises(ResourceError, match="--kv-dtype int5: there is no such type; choose from auto, bf16"):
        CacheOptions(dtype="int5")
    for name in ("int4", "int4+4"):
        with pytest.raises(ResourceError, match=rf"--kv-dtype {name.replace('+', '.')}: packs two .* 33; use int8"):
            cache_format(name, torch.float32, [LayerShape(1, 33, 32)], CPU)
    with pytest.raises(ResourceError, match="does not hold a block of 32 tokens next to"):
        open_model(llama, CPU, CacheOptions(dtype="int4", memory=100_000))
    with pytest.raises(ResourceError, match=r"--kv-dtype bf16: on a GPU the unquantized cache of a torch.float16 model"):
        cache_format("bf16", torch.float16, [], torch.device("cuda"))
    assert set(QUANTIZED) < set(KV_DTYPES)
