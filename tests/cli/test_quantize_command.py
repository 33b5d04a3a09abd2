"""`quantkit quantize`: options override recipes; its output; what is stored."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from helpers.command import FAST, quantkit, refused
from quantkit.recipe import Recipe, resolved_json

RTN = ("--method", "rtn")
MATRICES = 21


def stored(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "quantkit.json").read_text())
    return report


def test_options_override_the_recipe_and_the_rest_of_it_stays(llama: Path, tmp_path: Path) -> None:
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    recipe.write_text(
        "{description: mine, method: gptq, bits: 3, group_size: 32, symmetric: false, damping: 0.5, sweeps: 7, seed: 1, "
        "calibration: {source: c4, samples: 9}, rules: [{match: down_proj, bits: 8}]}"
    )
    options = ("--bits", 4, "--group-size", 16, "--sym", "--no-act-order", "--format", "gptq", "--seed", 2)
    calibration = ("--calib", text, "--samples", 3, "--seq-len", 32)
    done = quantkit("quantize", llama, "-o", tmp_path / "out", "--recipe", recipe, *RTN, *options, *calibration, "-q")
    assert done.status == 0, done.err
    from_options = {"method": "rtn", "bits": 4, "group_size": 16, "symmetric": True, "act_order": False, "format": "gptq"}
    from_recipe = {"damping": 0.5, "sweeps": 7, "rules": [{"match": "down_proj", "bits": 8}]}
    asked = {"calibration": {"source": str(text), "samples": 3, "seq_len": 32}, "seed": 2}
    expected = Recipe.model_validate(from_options | from_recipe | asked)
    report = stored(tmp_path / "out")
    assert report["recipe"] == resolved_json(expected)
    schemes = {matrix["name"]: matrix["scheme"] for matrix in report["matrices"]}
    assert schemes["model.layers.0.mlp.down_proj"] == "8-bit g16 sym"
    assert schemes["model.layers.0.mlp.up_proj"] == "4-bit g16 sym"


def test_a_partial_calibration_option_keeps_the_recipes_other_fields(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"method": "rtn", "calibration": {"samples": 9, "seq_len": 99}}))
    assert quantkit("quantize", llama, "-o", tmp_path / "out", "--recipe", recipe, "--samples", 8, "-q").status == 0
    assert stored(tmp_path / "out")["recipe"]["calibration"] == {"source": "builtin", "samples": 8, "seq_len": 99}


def test_auto_group_size_is_resolved_in_what_is_stored(llama: Path, tmp_path: Path) -> None:
    assert quantkit("quantize", llama, "-o", tmp_path / "out", *RTN, "-q").status == 0
    assert stored(tmp_path / "out")["recipe"]["group_size"] == 64


def test_json_holds_what_is_stored_and_stdout_nothing_else(llama: Path, tmp_path: Path) -> None:
    done = quantkit("quantize", llama, "-o", tmp_path / "out", *RTN, "--json", "-")
    report = json.loads(done.out)
    assert report == stored(tmp_path / "out")
    assert "worst five" in done.err
    assert report["totals"]["matrices"] == len(report["matrices"]) == MATRICES
    assert all(name in done.err for name in report["worst"])


def test_json_file(llama: Path, tmp_path: Path) -> None:
    done = quantkit("quantize", llama, "-o", tmp_path / "out", *RTN, "--json", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == stored(tmp_path / "out")
    assert "worst five" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {"out", "report.json"}


@pytest.mark.parametrize("flags", [("-q",), ("--quiet",), ("-q", "-v")])
def test_quiet(llama: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    done = quantkit("quantize", llama, "-o", tmp_path / "out", *RTN, *flags)
    assert (done.status, done.out, done.err) == (0, "", "")


def test_plain_lines_where_there_is_no_terminal(llama: Path, tmp_path: Path) -> None:
    done = quantkit("quantize", llama, "-o", tmp_path / "out", *RTN)
    lines = done.err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    for index, line in enumerate(lines):
        assert all(words in line for words in ("ETA", "MiB peak", f"model.layers.{index}.mlp.down_proj error"))


def test_a_bar_on_a_terminal(llama: Path, tmp_path: Path) -> None:
    done = quantkit("quantize", llama, "-o", tmp_path / "out", *RTN, terminal=True)
    assert done.status == 0
    assert "\x1b[" in done.err
    assert "3/3" in done.err
    assert "block 1/3" not in done.err


def test_verbose_has_a_line_a_matrix(llama: Path, tmp_path: Path) -> None:
    done = quantkit("quantize", llama, "-o", tmp_path / "out", *RTN, "-v")
    lines = [line for line in done.err.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == [matrix["name"] for matrix in stored(tmp_path / "out")["matrices"]]
    assert all("error" in line and "dB" in line for line in lines)


def test_the_seed_draws_the_rows(llama: Path, tmp_path: Path) -> None:
    def tokens(name: str, *options: object) -> str:
        sizes = ("--samples", 4, "--seq-len", 32)
        done = quantkit("quantize", llama, "-o", tmp_path / name, "--method", "awq", *sizes, *options, "-q")
        assert done.status == 0, done.err
        return str(stored(tmp_path / name)["calibration_tokens_sha256"])

    first, again, other, without = tokens("a", "--seed", 1), tokens("b", "--seed", 1), tokens("c", "--seed", 2), tokens("d")
    assert first == again
    assert len({first, other, without}) == 3


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    plain = refused("quantize", tmp_path, "-o", tmp_path / "out")
    done = quantkit("quantize", tmp_path, "-o", tmp_path / "out", "--debug")
    assert done.status == 2
    assert done.err.startswith("Traceback")
    assert "CheckpointError" in done.err
    assert done.err.splitlines()[-1] == plain


def test_what_stays_in_16_bit_is_not_touched(llama_bf16: Path, tmp_path: Path) -> None:
    assert quantkit("quantize", llama_bf16, "-o", tmp_path / "out", "--recipe", "mixed-w4", *FAST, "-q").status == 0
    report = stored(tmp_path / "out")
    assert "model.layers.0.mlp.up_proj" in report["unquantized"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as artifact:
        names = set(artifact.keys())
        kept = [name for name in names if name.startswith("model.layers.0.") or "norm" in name or "embed" in name]
        for shard in llama_bf16.glob("*.safetensors"):
            with safe_open(shard, framework="pt") as source:
                for name in set(kept) & set(source.keys()):
                    assert artifact.get_tensor(name).equal(source.get_tensor(name)), name
                    kept.remove(name)
    assert kept == []
