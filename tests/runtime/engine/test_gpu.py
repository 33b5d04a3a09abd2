"""Whole models on a GPU: the same logits as on the CPU, and with CUDA graphs as without."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from helpers import tiny
from helpers.paged_logits import TOKENS, paged_logits
from quantkit.cli import app
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import ModelRunner, open_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PIECES = [70, 1, 1, 5, 1, 12]
KV_TYPES = ("auto", "fp8", "int8", "int4", "int4+4")


def opened(folder: Path, device: str, kv: str | torch.dtype = "auto") -> ModelRunner:
    return open_model(folder, torch.device(device), CacheOptions(memory=1 << 26, dtype=kv, max_batch=8))


def artifact(folder: Path, source: Path, bits: int) -> Path:
    options = ["--method", "rtn", "--bits", str(bits), "--group-size", "16", "-q"]
    done = CliRunner().invoke(app, ["quantize", str(source), "-o", str(folder), *options])
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 32])
def test_logits_are_those_of_the_cpu(tmp_path: Path, llama: Path, bits: int) -> None:
    folder = llama if bits == 32 else artifact(tmp_path / "out", llama, bits)
    found = paged_logits(opened(folder, "cuda"), TOKENS, PIECES)
    wanted = paged_logits(opened(folder, "cpu", torch.float32), TOKENS, PIECES)
    # float32 on both sides; sums of a few hundred products in other orders, through three blocks.
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kv", KV_TYPES)
def test_graphs_change_nothing(tmp_path: Path, llama_bf16: Path, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact(tmp_path / "out", llama_bf16, 4)
    replayed = paged_logits(opened(folder, "cuda", kv), TOKENS, PIECES)
    model = opened(folder, "cuda", kv)
    monkeypatch.setattr(model, "backends", model.backends[-1:])
    eager = paged_logits(model, TOKENS, PIECES)
    # A graph's batch is padded, and attention may split its contexts elsewhere: other orders of sums, rounded to bfloat16.
    assert float((replayed - eager).abs().max()) <= 0.03 * float(eager.abs().max())


def _texts(model: ModelRunner, params: SamplingParams) -> list[list[int]]:
    prompts = [TOKENS[:n].tolist() for n in (1, 17, 40, 64, 90)]
    engine = Engine(model, EngineConfig(max_batch=4, token_budget=64))
    return [out.token_ids for out in engine.generate([Request(prompt, params) for prompt in prompts])]


def test_samples_of_a_seed_are_the_same_again(llama_bf16: Path) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=24, seed=3, ignore_eos=True, logprobs=3)
    model = opened(llama_bf16, "cuda")
    assert _texts(model, params) == _texts(model, params)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_runs(tmp_path: Path, family: str) -> None:
    model = opened(tiny.make_model(tmp_path / "model", family), "cuda")
    found = _texts(model, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert all(len(text) == 8 for text in found)
