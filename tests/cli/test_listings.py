"""Help, version, and the verbs that list built-in recipes and texts."""

import json
from importlib import resources

import pytest

import quantkit as package
from helpers.command import quantkit, refused
from quantkit.cli.verbs import VERBS


@pytest.fixture(autouse=True)
def _wide_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")


def shipped(folder: str) -> set[str]:
    files = resources.files(f"quantkit.{folder}").iterdir()
    return {file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")}


def test_verbs() -> None:
    assert " ".join(VERBS) == "quantize eval generate serve bench deploy inspect convert recipes calib"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_help_has_an_example(verb: str, flag: str) -> None:
    done = quantkit(verb, flag)
    assert done.status == 0
    assert "Example: quantkit " in done.out
    assert done.err == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_names_options_that_exist(verb: str) -> None:
    help_text = quantkit(verb, "--help").out
    # What follows ` -- ` are options of another program.
    example = help_text[help_text.index("Example: ") :].split("(")[0].split(" -- ")[0]
    options = {word for word in example.split() if word.startswith("--")}
    own = help_text[: help_text.index("Example: ")] + quantkit("quantize", "--help").out
    assert all(option in own for option in options)


def test_root_help_lists_every_verb() -> None:
    done = quantkit("--help")
    assert done.status == 0
    assert all(VERBS.description(verb) in done.out for verb in VERBS)


def test_version() -> None:
    done = quantkit("--version")
    assert (done.status, done.out) == (0, f"quantkit {package.__version__}\n")


@pytest.mark.parametrize(("verb", "folder"), [("recipes", "recipes"), ("calib", "data.calibration_sets")])
class TestListing:
    def test_table_names_everything(self, verb: str, folder: str) -> None:
        done = quantkit(verb)
        assert done.status == 0
        assert all(name in done.out for name in shipped(folder))

    def test_json_holds_everything_and_nothing_else_is_printed(self, verb: str, folder: str) -> None:
        assert set(json.loads(quantkit(verb, "--json", "-").out)) == shipped(folder)


def test_recipes_asked_for_by_the_issue() -> None:
    resolved = json.loads(quantkit("recipes", "--json", "-").out)
    assert {"awq-w4", "gptq-w4", "gptq-w3", "gptq-w2", "gptq-w8", "awq+gptq-w4"} <= set(resolved)
    assert any(recipe["rules"] for recipe in resolved.values())
    for name, recipe in resolved.items():
        if "-w" in name and not recipe["rules"]:
            assert name == f"{recipe['method']}-w{recipe['bits']}"


def test_calibration_sets_asked_for_by_the_issue() -> None:
    sets = json.loads(quantkit("calib", "--json", "-").out)
    assert {"builtin", "wikitext2", "c4", "pile-val", "ultrachat"} <= set(sets)
    assert sets["ultrachat"]["chat"]
    assert all(entry["licence"] and entry["split"] and entry["column"] for entry in sets.values())


@pytest.mark.parametrize("verb", ["recipes", "calib"])
def test_json_that_cannot_be_written(verb: str) -> None:
    assert "cannot be written" in refused(verb, "--json", "no/such/folder/file.json")
