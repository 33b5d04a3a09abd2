"""The model card of an artifact: metadata for the Hub, licences, the source's own card, and measured numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from huggingface_hub import ModelCard

from helpers import tiny
from helpers.command import quantkit, refused
from quantkit import quantize
from quantkit.checkpoint import files
from quantkit.checkpoint.locate import hub_id
from quantkit.formats.convert import convert
from quantkit.formats.model_card import front_matter, require_measurable, write_measurements

APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"
MIT = "MIT License\n\nCopyright (c) 2026 Somebody\n\nPermission is hereby granted, free of charge, to any person ..."

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama of one block. Read only."""
    return tiny.make_model(tmp_path_factory.mktemp("card") / "model", num_hidden_layers=1)


@pytest.fixture
def made(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """(files of the source, folder of the source, recipe) -> its artifact; nothing is flushed."""
    monkeypatch.setattr(files, "sync", lambda path: None)

    def make(given: dict[str, str | bytes], folder: str = "source", **recipe: Any) -> Path:
        source = shutil.copytree(tiny_model, tmp_path / folder)
        for name, text in given.items():
            (source / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        out = tmp_path / f"{source.name}-w4"
        quantize(source, out, "rtn-w4", device="cpu", **{"group_size": 32} | recipe)
        return out

    return make


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and body, as the Hub's own client reads them."""
    loaded = ModelCard.load(folder / "README.md")
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == loaded.data.to_dict()
    return loaded.data.to_dict(), body


def test_a_source_that_says_nothing(made: Make, tmp_path: Path) -> None:
    out = made({})
    metadata, body = card(out)
    assert metadata == {"tags": ["quantkit", "rtn", "4-bit", "compressed-tensors"]}
    assert "# A `llama` model, 4-bit weights\n" in body
    assert "| Quantized | 7 matrices: 4-bit g32 asym |\n| Method | rtn |\n" in body
    assert "Calibration" not in body
    assert "| vLLM | yes | `vllm serve PATH --tensor-parallel-size 1` |" in body
    assert "| quantkit | yes | " in body
    assert "which its files do not name" in body
    assert "quantkit quantize MODEL -o OUT --recipe quantkit.json" in body
    assert "Measured" not in body
    assert str(tmp_path) not in (out / "README.md").read_text()
    assert not (out / "README.base.md").exists()


def test_what_the_source_states(made: Make) -> None:
    """Copied as stated, even `no` for Norwegian, which YAML reads as false; values that are not text are left out."""
    licence = "license: other\nlicense_name: tiny-1.0\nlicense_link: https://example.org/l\n"
    shown = "language: [no, en]\npipeline_tag: text-generation\nlibrary_name: transformers\n"
    own = f"---\n{licence}{shown}base_model: org/Original\ndatasets: [a]\n---\n# Mine\n"
    out = made({"README.md": own, "LICENSE": APACHE, "chat.md": "more"})
    metadata, body = card(out)
    assert metadata == {
        "base_model": "org/Original",
        "license": "other",
        "license_name": "tiny-1.0",
        "license_link": "https://example.org/l",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["no", "en"],
        "tags": ["quantkit", "rtn", "4-bit", "compressed-tensors"],
    }
    assert (out / "README.base.md").read_text() == own
    assert "[README.base.md](README.base.md)" in body
    assert "The original model's: `tiny-1.0`, [LICENSE](LICENSE)." in body
    assert (out / "LICENSE").read_text() == APACHE
    assert (out / "chat.md").read_text() == "more"


@pytest.mark.parametrize(
    ("given", "licence"),
    [
        ({"LICENSE": APACHE}, "apache-2.0"),
        ({"LICENSE.txt": MIT}, "mit"),
        ({"LICENSE": "All rights reserved; not the Apache License Version 2.0, January 2004."}, None),
        ({"LICENSE": b"\xff\xfe"}, None),
        ({"README.md": "---\nlicense: gemma\n---\n", "LICENSE": MIT}, "gemma"),
        ({"README.md": "---\nlicense: [a, b]\n---\n"}, None),
        ({"README.md": "---\nlicense: 1.0\n---\n"}, "1.0"),
        ({"README.md": "---\n- license\n---\n"}, None),
        ({"README.md": "---\nlicense: {\n---\n"}, None),
        ({"README.md": b"\xff no front matter"}, None),
        ({"README.md": "\ufeff---\r\nlicense: mit\r\n---\r\n"}, "mit"),
    ],
)
def test_licences(made: Make, given: dict[str, str | bytes], licence: str | None) -> None:
    out = made(given)
    assert card(out)[0].get("license") == licence
    if "README.md" in given:
        whole = given["README.md"]
        assert (out / "README.base.md").read_bytes() == (whole if isinstance(whole, bytes) else whole.encode())


def test_a_source_from_the_hub(made: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub id of the source is listed before the model that the source was trained from."""
    out = made({"README.md": "---\nbase_model: org/Older\n---\n"}, "models--org--My-Model/snapshots/0123")
    metadata, body = card(out)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/My-Model", "quantized")
    assert "# My-Model, 4-bit weights\n" in body
    assert "[org/My-Model](https://huggingface.co/org/My-Model)" in body


@pytest.mark.parametrize("base", ["/home/me/model", "./model", "model", "[org/A, ./b]", "{a: b}"])
def test_a_path_is_no_base_model(made: Make, base: str) -> None:
    assert "base_model" not in card(made({"README.md": f"---\nbase_model: {base}\n---\n"}))[0]


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    assert hub_id(tmp_path / "demo") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_id(tmp_path / "models--a--b--c" / "snapshots" / "1") == "a/b--c"
    assert hub_id(tmp_path / "models--a--b") is None
    assert hub_id(tmp_path / "b" / "snapshots" / "1") is None


def test_two_runs_write_the_same_card(made: Make, tmp_path: Path) -> None:
    """The card depends neither on names nor on locations of folders."""
    given = {"README.md": "---\nlicense: mit\n---\nhello", "text.txt": "word " * 2000}
    first, second = made(given, "a"), made(given, "b/c")
    assert (first / "README.md").read_bytes() == (second / "README.md").read_bytes()
    calibrated = {"method": "gptq", "calibration": {"source": str(tmp_path / "a" / "text.txt"), "samples": 4, "seq_len": 64}}
    _, body = card(made({}, "d", **calibrated, bits=3))
    assert "| Calibration | 4 rows of 64 tokens from a text file |" in body
    assert "| SGLang | no: needs 4 or 8 bits |  |" in body


def test_converting_goes_on_from_the_original(made: Make, tmp_path: Path) -> None:
    """There and back: the same card, with the source's own card kept; measured numbers are not copied."""
    own = "---\nlicense: mit\nlanguage: no\n---\n# Mine\n"
    out = made({"README.md": own}, "models--org--Mine/snapshots/1")
    before = (out / "README.md").read_bytes()
    write_measurements(out, "numbers")
    convert(out, tmp_path / "gptq", "gptq", overwrite=False)
    metadata, body = card(tmp_path / "gptq")
    assert metadata["tags"] == ["quantkit", "rtn", "4-bit", "gptq"]
    assert (metadata["base_model"], metadata["license"], metadata["language"]) == ("org/Mine", "mit", "no")
    assert "numbers" not in body
    assert (tmp_path / "gptq" / "README.base.md").read_text() == own
    convert(tmp_path / "gptq", tmp_path / "back", "compressed-tensors", overwrite=False)
    assert (tmp_path / "back" / "README.md").read_bytes() == before


def test_converting_what_another_tool_made(made: Make, tmp_path: Path) -> None:
    out = made({})
    (out / "quantkit.json").unlink()
    (out / "README.md").write_text("---\nbase_model: org/Original\n---\nby another tool\n")
    convert(out, tmp_path / "gptq", "gptq", overwrite=False)
    metadata, body = card(tmp_path / "gptq")
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/Original", "quantized")
    assert metadata["tags"] == ["quantkit", "4-bit", "gptq"]
    assert "Method" not in body
    assert "Reproduce" not in body
    assert (tmp_path / "gptq" / "README.base.md").read_text().endswith("by another tool\n")


def test_a_quantized_head_is_told(made: Make) -> None:
    """SGLang loads such an artifact only if the head is in 16 bit."""
    _, body = card(made({}, symmetric=True, rules=({"match": "lm_head", "bits": 8},)))
    assert "# A `llama` model, 4-bit and 8-bit weights" in body
    assert "| SGLang | no: takes the quantized output head of a compressed-tensors artifact for a dense one |  |" in body
    assert "| vLLM | yes, its output head is quantized" in body


# Measured numbers.


def test_measurements_replace_only_themselves(made: Make) -> None:
    out = made({})
    path = out / "README.md"
    path.write_text(path.read_text().replace("## Load it", "Words of the user's.\n\n## Load it"))
    before = path.read_text()
    write_measurements(out, "## Measured\n\nfirst")
    first = path.read_text()
    assert "Words of the user's." in first
    assert first.index("## Licence") < first.index("first") < first.index("## Reproduce it")
    write_measurements(out, "## Measured\n\nsecond")
    assert path.read_text() == first.replace("first", "second")
    section = first[first.index("<!-- measured") : first.index("## Reproduce it")]
    assert first.replace(section, "") == before
    path.write_text("Rewritten.\n")
    write_measurements(out, "third")
    assert path.read_text().startswith("Rewritten.\n\n<!-- measured by quantkit eval: begin -->\nthird\n")


def test_killed_while_writing(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made({})
    before = (out / "README.md").read_bytes()
    monkeypatch.setattr(files, "sync", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_measurements(out, "numbers")
    assert (out / "README.md").read_bytes() == before
    monkeypatch.undo()
    require_measurable(out)
    write_measurements(out, "numbers")
    assert sorted(path.name for path in out.glob("README*")) == ["README.md"]


def test_eval_writes_the_card(made: Make, tiny_model: Path, tmp_path: Path) -> None:
    """Two runs write the same bytes, without paths of the machine."""
    out = made({})
    command = ("eval", out, "--baseline", tiny_model, "--windows", "2", "--seq-len", "32", "--write-card", "-q")
    assert quantkit(*command, "--json", tmp_path / "report.json").status == 0
    first = (out / "README.md").read_text()
    assert quantkit(*command).status == 0
    assert (out / "README.md").read_text() == first
    metrics = json.loads((tmp_path / "report.json").read_text())["model"]["metrics"]
    assert f"| KL divergence, mean (nats) |  | {metrics['kl_mean']:.4f} |" in first
    assert f"{metrics['perplexity']:.3f} (" in first
    assert "    quantkit eval PATH --baseline MODEL --text builtin --windows 2 --seq-len 32\n" in first
    assert "Versions: quantkit " in first
    assert str(tmp_path) not in first
    assert "quantkit" in card(out)[0]["tags"]
    assert front_matter(out / "README.md")["tags"] == ["quantkit", "rtn", "4-bit", "compressed-tensors"]


def test_eval_refuses_what_has_no_card(made: Make, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything is computed."""
    out = made({})
    monkeypatch.setattr("quantkit.evaluation.run.run_evaluation", Mock(side_effect=AssertionError))
    card_of = ("--baseline", tiny_model, "--write-card")
    assert "--write-card needs an artifact with quantkit's model card" in refused("eval", tiny_model, *card_of)
    assert "--write-card: owner/name is no local folder" in refused("eval", "owner/name", *card_of)
    for options in (("--write-card",), (*card_of, "--speed"), (*card_of, "--tasks", "x")):
        assert "name that with --baseline, and leave --speed and --tasks out" in refused("eval", out, *options)
    (out / "README.md").write_text("of another tool\n")
    assert "--write-card needs an artifact with quantkit's model card" in refused("eval", out, *card_of)


def test_eval_refuses_a_folder_that_cannot_be_written(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made({})
    monkeypatch.setattr(Path, "touch", Mock(side_effect=PermissionError(13, "Permission denied")))
    message = refused("eval", out, "--baseline", out, "--write-card")
    assert message == f"error: {out}: --write-card cannot write there (Permission denied); copy the artifact first"
