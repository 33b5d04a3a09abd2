"""`quantkit quantize --plan`: reports time and memory of a run, and changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from helpers.command import FAST, quantkit
from quantkit.checkpoint.reader import Checkpoint


def plan(*arguments: object) -> dict[str, Any]:
    done = quantkit("quantize", *arguments, "--plan", "--json", "-")
    assert done.status == 0, done.err
    prediction: dict[str, Any] = json.loads(done.out)
    return prediction


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_changes_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path), snapshot(llama)
    assert quantkit("quantize", llama, "-o", "out", *FAST, "--plan").status == 0
    assert (snapshot(tmp_path), snapshot(llama)) == before


def test_shows_everything_and_json_holds_it(llama: Path, tmp_path: Path) -> None:
    shown = quantkit("quantize", llama, "-o", tmp_path / "out", "--recipe", "mixed-w4", *FAST, "--plan").out
    for words in ("host memory", "device memory", "disk", "time", "s per block", "4-bit g64 sym", "8-bit g64 sym"):
        assert words in shown
    for words in ("16 bit: skipped by a rule", "16 bit: embeddings are looked up", "lm_head", "loads in vLLM", "SGLang"):
        assert words in shown
    prediction = plan(llama, "-o", tmp_path / "out", "--recipe", "mixed-w4", *FAST)
    assert prediction["schemes"]["model.layers.2.mlp.down_proj"] == "8-bit g64 sym"
    assert set(prediction["schemes"]) == {name for name in prediction["schemes"] if ".layers.0." not in name}
    assert set(prediction["unquantized"]) >= {"model.layers.0.mlp.down_proj", "lm_head", "model.embed_tokens"}
    assert {engine["name"] for engine in prediction["engines"]} == {"vLLM", "SGLang", "transformers"}
    assert all(prediction[key] > 0 for key in ("host_bytes", "disk_bytes", "working_bytes", "free_bytes"))
    assert prediction["seconds"] >= prediction["block_seconds"] > 0
    assert prediction["device_bytes"] == 0


def test_quiet_plan_prints_nothing(llama: Path, tmp_path: Path) -> None:
    done = quantkit("quantize", llama, "-o", tmp_path / "out", "--method", "rtn", "--plan", "-q")
    assert (done.status, done.out, done.err) == (0, "", "")


HEAD = "rules: [{match: lm_head, bits: 8}, {match: 'layers.1.*down_proj', skip: true}]"
GRIDS = [
    *(("compressed-tensors", bits, grid) for bits in (2, 3, 4, 8) for grid in ("--sym", "--asym")),
    *(("gptq", bits, grid) for bits in (2, 3, 4, 8) for grid in ("--sym", "--asym")),
    ("awq", 4, "--asym"),
]


@pytest.mark.parametrize("model", ["llama", "llama_bf16"])
@pytest.mark.parametrize(("form", "bits", "grid"), GRIDS)
def test_disk_is_predicted(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, form: str, bits: int, grid: str
) -> None:
    options = ("--method", "rtn", "--format", form, "--bits", bits, grid, "--group-size", 32)
    require_predicted(request.getfixturevalue(model), tmp_path / "out", *options)


def test_disk_is_predicted_with_rules_and_a_quantized_head(llama_bf16: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(HEAD)
    require_predicted(llama_bf16, tmp_path / "out", "--recipe", recipe, "--method", "rtn")


@pytest.mark.parametrize("recipe", ["{}", HEAD])
def test_disk_is_predicted_of_a_rotated_model(tmp_path: Path, recipe: str) -> None:
    """Its head is no longer the embedding, whether it is quantized or not."""
    model = tiny.make_model(tmp_path / "model", "qwen2")
    (tmp_path / "recipe.yaml").write_text(recipe)
    require_predicted(model, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", "--method", "rtn", "--rotate")


def require_predicted(model: Path, out: Path, *options: object) -> None:
    prediction = plan(model, "-o", out, *options)
    assert quantkit("quantize", model, "-o", out, *options, "-q").status == 0
    real = sum(info.nbytes for info in Checkpoint(out).tensors.values())
    assert prediction["disk_bytes"] == real
    assert prediction["working_bytes"] > real
