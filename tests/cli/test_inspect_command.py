"""`quantkit inspect` and `quantkit convert` through the command line."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.command import imported_by, quantkit, refused


@pytest.fixture(scope="module")
def artifact(llama_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    assert quantkit("quantize", llama_bf16, "-o", out, "--method", "rtn", "-q").status == 0
    return out


def test_dense(llama_bf16: Path) -> None:
    facts = json.loads(quantkit("inspect", llama_bf16, "--json", "-").out)
    shards = len(list(llama_bf16.glob("*.safetensors")))
    assert shards > 1
    assert facts["shards"] == shards
    assert (facts["architecture"], facts["format"], facts["bits per weight"]) == ("llama", "dense", 16)
    assert facts["schemes"] == {}


def test_quantized(artifact: Path) -> None:
    done = quantkit("inspect", artifact, "--json", "-")
    facts = json.loads(done.out)
    assert facts["format"] == "compressed-tensors"
    assert facts["schemes"] == {"4-bit g64 sym": 21}
    assert 4 < facts["bits per weight"] < 5
    assert facts["method"] == "rtn"
    shown = quantkit("inspect", artifact).out
    for words in ("llama", "compressed-tensors", "4-bit g64 sym", "21 matrices", "loads in vLLM", facts["worst matrix"]):
        assert words in shown


def test_rotated(llama_bf16: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = quantkit("quantize", llama_bf16, "-o", out, "--method", "rtn", "--rotate", "--plan").out
    assert "rotated: quantkit's own engine runs it" in planned
    assert quantkit("quantize", llama_bf16, "-o", out, "--method", "rtn", "--rotate", "-q").status == 0
    facts = json.loads(quantkit("inspect", out, "--json", "-").out)
    assert facts["online"] == "Hadamard transform of the inputs of down_proj, in blocks of 128"
    assert not any(engine["loads"] for engine in facts["engines"])


def test_somebody_elses_artifact_needs_no_report(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "model")
    (tmp_path / "model" / "quantkit.json").unlink()
    facts = json.loads(quantkit("inspect", tmp_path / "model", "--json", "-").out)
    assert facts["schemes"] == {"4-bit g64 sym": 21}
    assert "method" not in facts


@pytest.mark.parametrize(
    "report", ["{}", '{"recipe": 3}', '{"recipe": {"method": "rtn"}, "totals": [], "worst": []}', "{", "[]"]
)
def test_broken_report(artifact: Path, tmp_path: Path, report: str) -> None:
    shutil.copytree(artifact, tmp_path / "model")
    (tmp_path / "model" / "quantkit.json").write_text(report)
    assert "quantkit.json" in refused("inspect", tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{}", "model_type"),
        ("config.json", '{"model_type": "llama", "quantization_config": {"quant_method": "magic"}}', "magic"),
        ("config.json", '{"model_type": "llama", "quantization_config": 4}', "quantization_config"),
        ("model.safetensors", "garbage", "truncated or damaged"),
    ],
)
def test_bad_folder(artifact: Path, tmp_path: Path, name: str, content: str, words: str) -> None:
    shutil.copytree(artifact, tmp_path / "model")
    (tmp_path / "model" / name).write_text(content)
    assert words in refused("inspect", tmp_path / "model")


def test_empty_folder(tmp_path: Path) -> None:
    assert "config.json: not found" in refused("inspect", tmp_path)


def test_convert_and_back(artifact: Path, tmp_path: Path) -> None:
    done = quantkit("convert", artifact, tmp_path / "gptq", "--format", "gptq", "--json", "-")
    assert json.loads(done.out) == {"out": str(tmp_path / "gptq"), "format": "gptq", "matrices": 21}
    assert json.loads(quantkit("inspect", tmp_path / "gptq", "--json", "-").out)["format"] == "gptq"
    assert "21 matrices" in quantkit("convert", tmp_path / "gptq", tmp_path / "back", "--format", "compressed-tensors").out
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (artifact / "model.safetensors").read_bytes()


def test_convert_refuses(llama: Path, artifact: Path, tmp_path: Path) -> None:
    assert "use `quantkit quantize`" in refused("convert", llama, tmp_path / "out", "--format", "gptq")
    assert "exists" in refused("convert", artifact, llama, "--format", "gptq")
    assert not any(tmp_path.iterdir())


def test_headers_are_read_without_torch(llama_bf16: Path, artifact: Path) -> None:
    for folder in (llama_bf16, artifact):
        assert imported_by("inspect", folder).isdisjoint(("torch", "transformers", "datasets", "huggingface_hub"))
