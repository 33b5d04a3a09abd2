"""Rotated artifacts in the engine: the online transform, and drafts that stay good with 4-bit activations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from helpers.paged_logits import TOKENS, paged_logits
from helpers.rotated import HEAD, reference_logits
from helpers.self_drafts import engine, generated, opened, speculation
from quantkit.cli import app
from quantkit.kernels.cpu import library
from quantkit.recipe import Rule
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import EngineConfig
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model import model_runner
from quantkit.runtime.model.model_runner import open_model

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[3] / "quantkit" / "recipes" / "qspec-w4.yaml"


@pytest.mark.parametrize("way", ["decoder", "definition", "torch"])
@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", {"bits": 4, "group_size": 32, "rules": HEAD}),
        ("llama", {"bits": 8, "rules": (Rule(match=r"layers\.1\.mlp\.down_proj", skip=True),)}),
        ("qwen2", {"bits": 8, "method": "awq+gptq"}),
        ("phi3", {"bits": 8, "method": "rtn"}),
        ("granite", {"bits": 8, "method": "awq"}),
    ],
)
def test_the_engine_computes_what_the_dequantized_weights_do(
    made: Callable[..., tuple[Path, Path]],
    family: str,
    recipe: dict[str, Any],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal up to the order of sums. With 8 bits the logits are also close to those of the original."""
    if way == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    if way == "definition":
        monkeypatch.setattr(model_runner, "native_backend", lambda *_: None)
    model, out = made(family, **recipe)
    tokens = TOKENS[:60]
    wanted = reference_logits(out, tokens)
    found = paged_logits(opened(out), tokens, [40, 1, 19])
    # torch's int4 product rounds inputs, scales and sums to bfloat16 (2^-9 each), in every matrix on the way: some percent of
    # the largest logit, and how many changes with the codes. Native ones move inputs by up to 2^-16 of a group's largest.
    assert float((found - wanted).abs().max()) <= (5e-2 if way == "torch" else 5e-4) * float(wanted.abs().max())
    if recipe["bits"] == 8:
        original = reference_logits(model, tokens)
        assert float((wanted - original).abs().max()) <= 0.1 * float(original.abs().max())


@pytest.mark.parametrize(("bits", "least"), [(8, 0.8), (4, 0.05)])
@pytest.mark.parametrize(
    "config",
    [EngineConfig(max_batch=1, draft_len=3), EngineConfig(max_batch=6, token_budget=40, draft_len=5, prefix_caching=False)],
    ids=["alone", "batch"],
)
def test_greedy_output_is_the_models(
    made: Callable[..., tuple[Path, Path]],
    bits: int,
    least: float,
    config: EngineConfig,
) -> None:
    """The same tokens, with drafts that quantize rotated activations. Activations of random models have no outliers."""
    _, out = made("llama", bits=4, group_size=32, rules=HEAD)
    alone = generated(engine(opened(out), None, EngineConfig(max_batch=1)))
    running = engine(opened(out), bits, config)
    assert generated(running) == alone
    stats = speculation(running)
    assert stats.drafted > 50
    assert stats.accepted >= least * stats.drafted


@pytest.mark.slow
def test_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rotation, several times as many drafts with 4-bit activations are accepted; the text is that without drafts."""
    # The demo model is made once per machine, not once per test run.
    monkeypatch.delenv("QUANTKIT_CACHE")
    accepted = []
    for number, choice in enumerate(("--rotate", "--no-rotate")):
        out = tmp_path / str(number)
        options = ["--recipe", str(RECIPE), "--method", "rtn", "--group-size", "64", choice, "-q"]
        done = CliRunner().invoke(app, ["quantize", "demo", "-o", str(out), *options])
        assert done.exit_code == 0, done.output
        model = open_model(out, CPU, CacheOptions(memory=1 << 26))
        prompt = list(b"The history of the city begins in the twelfth century, when")
        params, texts = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True), []
        for bits in (None, 4):
            running = engine(model, bits, EngineConfig(max_batch=1, draft_len=3, prefix_caching=False))
            texts.append(running.generate([Request(prompt, params)])[0].token_ids)
        assert texts[0] == texts[1]
        stats = speculation(running)
        accepted.append(stats.accepted / stats.drafted)
    assert accepted[0] > 2 * accepted[1]
