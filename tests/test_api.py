"""quantkit from Python: what is exported, what importing it costs, and a model there and back."""

import subprocess
import sys
from pathlib import Path

import pytest

import quantkit
from quantkit import LLM, Recipe, SamplingParams, evaluate, quantize
from quantkit.errors import RecipeError, RequestError

CALIBRATION = {"samples": 8, "seq_len": 64}


def test_what_is_exported() -> None:
    assert quantkit.__all__ == ["LLM", "Recipe", "SamplingParams", "__version__", "evaluate", "quantize"]
    assert set(quantkit.__all__) <= set(dir(quantkit))
    assert all(getattr(quantkit, name) for name in quantkit.__all__)
    with pytest.raises(AttributeError, match="module 'quantkit' has no attribute 'nothing'"):
        quantkit.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import quantkit; dir(quantkit); quantkit.__version__", "numpy pydantic torch transformers triton yaml"),
        ("from quantkit import SamplingParams", "pydantic torch transformers triton yaml"),
    ],
)
def test_importing_is_cheap(statement: str, absent: str) -> None:
    """In a fresh interpreter: nothing heavy is loaded, and the environment stays as it was."""
    check = "import os, sys; before = dict(os.environ); {}; assert dict(os.environ) == before; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check.format(statement)], capture_output=True, text=True, check=True)
    assert set(absent.split()) & set(done.stdout.split()) == set()


@pytest.mark.parametrize("name", ["LLM", "LLM.generate", "Recipe", "SamplingParams", "evaluate", "quantize"])
def test_what_is_public_is_explained(name: str) -> None:
    found: object = quantkit
    for part in name.split("."):
        found = getattr(found, part)
    assert found.__doc__


@pytest.fixture(scope="module")
def artifact(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama in 4 bits, made from Python. Read only."""
    out = tmp_path_factory.mktemp("api") / "out"
    report = quantize(llama, out, "gptq-w4", device="cpu", group_size=32, calibration=CALIBRATION)
    assert report.recipe["group_size"] == 32
    assert report.recipe["calibration"]["samples"] == 8
    assert (out / "quantkit.json").is_file()
    return out


def test_a_recipe_in_three_forms(llama: Path, artifact: Path, tmp_path: Path) -> None:
    """By name, as an object and as the artifact's own record: the same tensors."""
    made = (artifact / "model.safetensors").read_bytes()
    recipe = Recipe(group_size=32, calibration=CALIBRATION)  # type: ignore[arg-type]
    quantize(str(llama), str(tmp_path / "object"), recipe, device="cpu")
    quantize(llama, tmp_path / "record", artifact / "quantkit.json", device="cpu")
    assert (tmp_path / "object" / "model.safetensors").read_bytes() == made
    assert (tmp_path / "record" / "model.safetensors").read_bytes() == made


def test_evaluate(llama: Path, artifact: Path) -> None:
    seen: list[str] = []
    report = evaluate(artifact, llama, windows=2, seq_len=32, device="cpu", progress=lambda stage, *_: seen.append(stage))
    assert report.ppl_increase is not None
    assert report.model.metrics.kl_mean is not None
    assert set(seen) == {"baseline", "model", "dequantized"}
    assert evaluate(artifact, llama, windows=2, seq_len=32, device="cpu").model == report.model


@pytest.fixture(scope="module")
def llm(artifact: Path) -> LLM:
    """The artifact, in an engine."""
    return LLM(artifact, device="cpu", kv_memory=1 << 20, max_batch=4)


def test_generate(llm: LLM) -> None:
    greedy = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    pieces: list[str] = []
    (one,) = llm.generate("abc", greedy, watch=lambda output: pieces.append(output.text))
    assert len(one.token_ids) == 6
    assert (one.finish_reason, one.usage.prompt, one.usage.generated) == ("length", 3, 6)
    assert "".join(pieces) == one.text
    two = llm.generate(["xy", "abc"], [SamplingParams(max_tokens=2, n=2, seed=1, ignore_eos=True), greedy])
    assert [len(output.token_ids) for output in two] == [2, 2, 6]
    assert two[2].token_ids == one.token_ids
    assert llm.generate([]) == []


def test_a_conversation_is_one_prompt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    monkeypatch.setattr(llm.session.tokenizer, "chat_template", template)
    params = SamplingParams(max_tokens=1, temperature=0)
    talk = [{"role": "user", "content": "hi"}]
    (alone,) = llm.generate(talk, params)
    assert alone.usage.prompt == len("user: hi\n")
    talks: list[str | list[dict[str, str]]] = [talk, "hi"]
    outputs = llm.generate(talks, params, chat=True)
    assert [output.token_ids for output in outputs] == [alone.token_ids] * 2


def test_refusals(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="1 sampling parameters for 2 prompts; give one, or one for each prompt"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(RequestError, match="no chat template"):
        llm.generate("a", chat=True)
    with pytest.raises(RecipeError, match=r"^Recipe: bits: "):
        quantize(tmp_path, tmp_path / "out", Recipe(), bits=5)
    with pytest.raises(RecipeError, match=r"^--device tpu: not a device"):
        LLM(tmp_path, device="tpu")
