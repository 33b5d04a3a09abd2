"""A model that drafts for itself with its own weights and cache: QSpec's quantized activations, QuantSpec's upper half."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from helpers import tiny
from helpers.exact import chi_square, probabilities
from helpers.fake_model import FakeModel, expected, logits_after
from helpers.paged_logits import TOKENS, paged_logits, reference_logits
from helpers.self_drafts import engine, generated, opened, speculation
from helpers.sequences import numbered  # noqa: F401
from quantkit.cli import app
from quantkit.errors import RequestError
from quantkit.kernels import reference
from quantkit.kernels.cpu import library
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model import model_runner
from quantkit.runtime.model.model_runner import ModelRunner, open_model
from quantkit.runtime.speculative.self_draft import SelfDraft

CPU = torch.device("cpu")
#: What is not packed is not rounded: in "mixed" the head and the down projection.
RECIPES = {
    "whole": "{method: rtn, bits: 4, group_size: 16, rules: [{match: lm_head, bits: 8}]}",
    "mixed": "{method: rtn, bits: 4, group_size: 16, rules: [{match: down_proj$, skip: true}]}",
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A model of a family, quantized by a recipe; each is made once."""
    folder = tmp_path_factory.mktemp("qspec")

    def get(family: str, recipe: str) -> Path:
        model, out = folder / family, folder / f"{family}-{recipe}"
        if not model.exists():
            tiny.make_model(model, family)
        if not out.exists():
            (folder / "recipe.yaml").write_text(RECIPES[recipe])
            options = ["--recipe", str(folder / "recipe.yaml"), "-q"]
            done = CliRunner().invoke(app, ["quantize", str(model), "-o", str(out), *options])
            assert done.exit_code == 0, done.output
        return out

    return get


class Rounded:
    """The draft pass in place of the model."""

    def __init__(self, model: ModelRunner, activation_bits: int) -> None:
        self.num_blocks, self.block_size = model.num_blocks, model.block_size
        self.forward = model.quantized_draft(activation_bits)


def rounded_reference(folder: Path, tokens: Tensor, bits: int, recipe: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """transformers' logits where every layer with packed weights rounds its input first, the head to 8 bits."""

    def forward(self: torch.nn.Linear, x: Tensor) -> Tensor:
        head, down = self.out_features == tiny.VOCAB, self.in_features == 128
        if recipe == "whole" or not (head or down):
            codes, scales = reference.quantize_rows(x.flatten(0, -2), 8 if head else bits)
            x = (codes * scales[:, None]).view_as(x)
        return torch.nn.functional.linear(x, self.weight, self.bias)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", forward)
        return reference_logits(folder, tokens)


@pytest.mark.parametrize("way", ["decoder", "definition", "torch"])
@pytest.mark.parametrize(("bits", "recipe", "count"), [(4, "whole", 90), (4, "mixed", 90), (8, "whole", 8), (8, "mixed", 8)])
def test_the_draft_pass(
    artifact: Callable[[str, str], Path],
    bits: int,
    recipe: str,
    count: int,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drafts quantize the same inputs as the oracle does.

    Sums differ in their order, by a millionth. Where that flips an integer next to a tie, everything after it is off by as
    much as quantization itself. With 8 bits, whose steps are small, a few tokens meet no tie.
    """
    folder, tokens, pieces = artifact("llama", recipe), TOKENS[:count], [count - 3, 1, 2]
    if way == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    if way == "definition":
        monkeypatch.setattr(model_runner, "native_backend", lambda *_: None)
    model = opened(folder)
    exact = paged_logits(model, tokens, pieces)
    found = paged_logits(Rounded(model, bits), tokens, pieces)
    wanted = rounded_reference(folder, tokens, bits, recipe, monkeypatch)
    assert (found - wanted).abs().max() <= 0.01 * (exact - wanted).abs().max()
    # The model itself is unchanged.
    assert torch.equal(paged_logits(model, tokens, pieces), exact)


def test_nothing_to_round(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="quantize it first"):
        opened(tiny.make_model(tmp_path / "model")).quantized_draft(8)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(("bits", "least"), [(8, 0.8), (4, 0.05)])
@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (EngineConfig(max_batch=1, draft_len=3), 4096),
        (EngineConfig(max_batch=6, token_budget=40, draft_len=5, prefix_caching=False), 4096),
        (EngineConfig(max_batch=6, draft_len=2, prefix_caching=False), 200),
    ],
    ids=["alone", "batch", "preemption"],
)
def test_greedy_output_is_the_models(
    artifact: Callable[[str, str], Path], family: str, bits: int, least: float, config: EngineConfig, tokens: int
) -> None:
    """The same tokens, however good the drafts are. At 4 bits those of random models with flat logits are poor."""
    folder = artifact(family, "whole")
    alone = generated(engine(opened(folder), None, EngineConfig(max_batch=1)))
    running = engine(opened(folder, tokens), bits, config)
    assert generated(running) == alone
    stats = speculation(running)
    assert stats.drafted > 50
    assert stats.accepted >= least * stats.drafted
    assert (running.stats.preemptions > 0) == (tokens == 200)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 20}, {"repetition_penalty": 1.2}])
def test_a_seed_gives_the_samples_that_it_gives_without_drafts(
    artifact: Callable[[str, str], Path], filters: dict[str, Any]
) -> None:
    """However long the drafts are, and whether a small token budget or a batch shortens them."""
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=3, ignore_eos=True, **filters)
    model = opened(artifact("llama", "whole"))
    wanted = generated(Engine(model, EngineConfig(max_batch=6)), params)
    for batch, budget, length in ((6, 512, 3), (3, 512, 5), (6, 8, 4), (3, 512, None)):
        running = engine(model, 8, EngineConfig(max_batch=batch, token_budget=budget, draft_len=length))
        assert generated(running, params) == wanted
        if length:  # The tiny model's distributions are flat, so small differences change the drawn tokens.
            assert speculation(running).accepted > 0.5 * speculation(running).drafts


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("batch", "chunk", "blocks"), [(1, 512, 64), (6, 40, 99), (6, 512, 30)], ids=["alone", "batch", "few"]
)
def test_drafts_from_the_upper_half_of_the_cache(
    artifact: Callable[[str, str], Path], family: str, batch: int, chunk: int, blocks: int
) -> None:
    """QuantSpec: the text is that of an int4+4 cache without drafts, to the token."""
    folder, dtype = artifact(family, "whole"), "int4+4"

    def model(num_blocks: int) -> ModelRunner:
        options = CacheOptions(memory=1 << 30, max_model_len=192, max_batch=6, block_size=8, dtype=dtype)
        found = open_model(folder, CPU, options)
        found.num_blocks = min(found.num_blocks, num_blocks)
        return found

    alone = generated(Engine(model(64), EngineConfig(max_batch=1)))
    small = model(blocks)
    config = EngineConfig(max_batch=batch, token_budget=chunk, draft_len=4, prefix_caching=False)
    running = Engine(small, config, proposer=SelfDraft(partial(small.forward, draft=True), small.block_size))
    assert generated(running) == alone
    stats = speculation(running)
    assert stats.drafted > 50
    # Drafts see 4 of the 8 bits of keys and values.
    assert stats.accepted >= 0.5 * stats.drafted


class Doubtful:
    """The draft pass of a fake model, in the same slots; two of three tokens are right."""

    def __init__(self, model: FakeModel) -> None:
        self._model = model

    def __call__(self, batch: Batch) -> Tensor:
        logits = self._model.forward(batch)
        wrong = logits.argmax(-1) % 3 == 0
        logits[wrong] = logits[wrong].roll(1, -1)
        return logits


@pytest.mark.parametrize(("num_blocks", "max_batch"), [(64, 1), (64, 8), (13, 8)], ids=["alone", "batch", "preemption"])
def test_drafts_stand_where_their_tokens_belong(num_blocks: int, max_batch: int) -> None:
    """A model that reads every slot back: slots that a draft wrote are never read as anything else."""
    model = FakeModel(num_blocks)
    running = Engine(model, EngineConfig(max_batch, 64, draft_len=4), proposer=SelfDraft(Doubtful(model), model.block_size))
    prompts = [[(7 * i + j) % 97 for j in range(3 + 4 * i)] for i in range(6)]
    outputs = running.generate([Request(prompt, SamplingParams(temperature=0, max_tokens=15)) for prompt in prompts])
    running.check()
    assert [output.token_ids for output in outputs] == [expected(prompt, 15) for prompt in prompts]
    stats = speculation(running)
    assert 0.2 < stats.accepted / stats.drafted < 0.9


@pytest.mark.usefixtures("numbered")
def test_samples_are_distributed_as_without_drafts() -> None:
    """Drafts are drawn from another distribution over four tokens; all outputs of three are counted."""
    vocab, count, prompt = 4, 1500, [2, 1]
    params = SamplingParams(max_tokens=3, temperature=3.0, top_p=0.9)
    model = FakeModel(256, 4, vocab_size=vocab)

    def forward(batch: Batch) -> Tensor:
        logits = model.forward(batch)
        return 0.4 * logits + 0.6 * logits.roll(1, -1)

    exact: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        after = {text: probabilities(logits_after([*prompt, *text], vocab), params).tolist() for text in exact}
        exact = {(*text, token): exact[text] * after[text][token] for text in exact for token in range(vocab)}
    running = Engine(model, EngineConfig(32, 256, draft_len=2), proposer=SelfDraft(forward, 4))
    outputs = running.generate([Request(prompt, params) for _ in range(count)])
    found = Counter(tuple(output.token_ids) for output in outputs)
    statistic, bound = chi_square(found, exact)
    assert statistic < bound
    stats = speculation(running)
    assert 0.3 < stats.accepted / stats.drafted < 0.95


@pytest.mark.slow
def test_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text with drafts of either kind. With 8 bits nearly all are accepted; with 4 bits, without rotation, few."""
    # The demo model is made once per machine, not once per test run.
    monkeypatch.delenv("QUANTKIT_CACHE")
    (tmp_path / "recipe.yaml").write_text("{method: rtn, bits: 4, group_size: 64, rules: [{match: ^lm_head$, bits: 8}]}")
    options = ["--recipe", str(tmp_path / "recipe.yaml"), "-q"]
    done = CliRunner().invoke(app, ["quantize", "demo", "-o", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    model = open_model(tmp_path / "out", CPU, CacheOptions(memory=1 << 26))
    prompt = list(b"The history of the city begins in the twelfth century, when")
    texts, accepted = [], []
    for bits in (None, 8, 4):
        running = engine(model, bits, EngineConfig(max_batch=1, draft_len=3, prefix_caching=False))
        params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
        texts.append(running.generate([Request(prompt, params)])[0].token_ids)
        if bits is not None:
            stats = speculation(running)
            accepted.append(stats.accepted / stats.drafted)
    assert texts[0] == texts[1] == texts[2]
    assert accepted[0] > 0.7  # near 0.9 over many texts; one of 48 tokens varies with the last bits of the model's sums
    assert accepted[0] > accepted[1]
    # The upper half of a cache, after several pages.
    cached = open_model(tmp_path / "out", CPU, CacheOptions(memory=1 << 27, max_model_len=256, max_batch=1, dtype="int4+4"))
    config = EngineConfig(max_batch=1, draft_len=4, prefix_caching=False)
    plain = Engine(cached, config).generate([Request(prompt, params)])
    running = Engine(cached, config, proposer=SelfDraft(partial(cached.forward, draft=True), cached.block_size))
    assert running.generate([Request(prompt, params)])[0].token_ids == plain[0].token_ids
    assert speculation(running).accepted > 0.8 * speculation(running).drafted
