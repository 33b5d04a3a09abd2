"""Recipes: what ships, what is laid over it, and which scheme a matrix gets."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from quantkit.errors import RecipeError
from quantkit.methods.scheme import Scheme
from quantkit.recipe import Recipe, Rule, builtin_recipes, load_recipe, recorded_computing, resolved_json

PATH = "model.layers.3.mlp.down_proj"


@pytest.mark.parametrize("name", builtin_recipes())
def test_what_ships_is_valid_and_described(name: str) -> None:
    assert load_recipe(name, {}) != Recipe() or name == "gptq-w4"
    assert "description: " in builtin_recipes()[name]


@pytest.mark.parametrize("name", builtin_recipes())
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_resolved_recipe_reproduces_itself(tmp_path: Path, name: str, suffix: str) -> None:
    recipe = load_recipe(name, {"seed": 3, "calibration": {"samples": 5}})
    resolved = resolved_json(recipe)
    path = tmp_path / f"quantkit.{suffix}"
    path.write_text(json.dumps({"recipe": resolved} if suffix == "json" else resolved))
    assert load_recipe(str(path), {}) == recipe


def test_json_is_read_as_json(tmp_path: Path) -> None:
    """YAML takes no tabs, and 1e-05 for a text."""
    path = tmp_path / "quantkit.json"
    path.write_text(json.dumps({"recipe": resolved_json(Recipe(damping=1e-05))}, indent="\t"))
    assert load_recipe(str(path), {}).damping == 1e-05


@pytest.mark.parametrize(
    ("report", "known"),
    [
        (
            {"versions": {"threads": "3", "matmul": "bfloat16", "hessian": "bfloat16"}},
            {"threads": 3, "matmul": "bfloat16", "hessian": "bfloat16"},
        ),
        ({"versions": {"matmul": "bfloat16", "hessian": ["bfloat16"]}}, {"matmul": "bfloat16", "hessian": "float32"}),
        ({"versions": {"threads": "0", "matmul": "int8"}}, {}),
        ({"versions": {"threads": "99999999", "matmul": ["float32"]}}, {}),
        ({"versions": {"threads": [3], "matmul": "float32"}}, {"matmul": "float32", "hessian": "float32"}),
        ({"versions": {}}, {}),
        ({"versions": []}, {}),
        ({}, {}),
    ],
)
def test_how_a_report_was_computed(tmp_path: Path, report: dict[str, Any], known: dict[str, Any]) -> None:
    (tmp_path / "quantkit.json").write_text(json.dumps(report))
    assert recorded_computing(str(tmp_path / "quantkit.json")) == known


def test_other_recipes_record_no_way_to_compute() -> None:
    assert recorded_computing("gptq-w4") == {}


def test_overrides_replace_fields_and_complete_the_calibration() -> None:
    recipe = load_recipe("gptq-w3", {"bits": 8, "calibration": {"seq_len": 99}})
    assert (recipe.bits, recipe.symmetric, recipe.calibration.seq_len, recipe.calibration.samples) == (8, False, 99, 128)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], Scheme(4, 64, True)),
        ([{"match": "down_proj", "bits": 8}], Scheme(8, 64, True)),
        ([{"match": "down_proj", "group_size": -1, "symmetric": False}], Scheme(4, -1, False)),
        ([{"match": "down_proj", "skip": True}], None),
        ([{"match": "^down_proj", "skip": True}], Scheme(4, 64, True)),
        ([{"match": r"layers\.3\.", "bits": 2}, {"match": "down_proj", "skip": True}], Scheme(2, 64, True)),
        ([{"match": r"layers\.4\.", "bits": 2}, {"match": "down_proj", "skip": True}], None),
    ],
)
def test_first_matching_rule_decides(rules: list[dict[str, Any]], expected: Scheme | None) -> None:
    recipe = Recipe(bits=4, group_size=64, symmetric=True, rules=tuple(Rule.model_validate(rule) for rule in rules))
    assert recipe.scheme(PATH) == expected


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("method", "best", "method"),
        ("bits", 5, "2, 3, 4 or 8"),
        ("group_size", 12, "not a multiple of 8"),
        ("group_size", 0, "not a multiple of 8"),
        ("group_size", -2, "not a multiple of 8"),
        ("damping", 0, "damping"),
        ("coordinate_descent_passes", 21, "coordinate_descent_passes: Input should be"),
        ("sweeps", 21, "coordinate_descent_passes: Input should be"),
        ("drift", -1, "asymmetric_calibration: Input should be"),
        ("format", "gguf", "format"),
        ("rules", [{"match": "["}], "rules.0.match: not a regular expression"),
        ("rules", [{"bits": 4}], "rules.0.match: Field required"),
        ("bit", 4, "bit: Extra inputs"),
        ("calibration", {"sample": 4}, "calibration.sample: Extra inputs"),
        ("calibration", {"seq_len": 15}, "calibration.seq_len"),
    ],
)
def test_wrong_field_is_named(tmp_path: Path, field: str, value: Any, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({field: value}))
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path), {})
    assert words in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("recipe.yaml", "a: b: c", "cannot be read as YAML"),
        ("quantkit.json", "{", "cannot be read as JSON"),
        ("quantkit.json", "{}", "holds no recipe"),
        ("quantkit.json", '{"recipe": []}', "holds no recipe"),
        ("recipe.yaml", "[]", "holds no recipe"),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=f"{name}.*{words}"):
        load_recipe(str(tmp_path / name), {})


@pytest.mark.parametrize("name", ["nothing", ".", "gptq-w5"])
def test_unknown_recipe_lists_those_that_ship(name: str) -> None:
    with pytest.raises(RecipeError, match="neither a file nor one of: awq"):
        load_recipe(name, {})


OLD_KEYS = {"drift": 0.5, "sweeps": 2}
CURRENT_KEYS = {"asymmetric_calibration": 0.5, "coordinate_descent_passes": 2}


@pytest.mark.parametrize(("name", "inside"), [("recipe.yaml", False), ("quantkit.json", True)])
def test_old_keys_are_read_and_current_ones_are_written(tmp_path: Path, name: str, inside: bool) -> None:
    path = tmp_path / name
    path.write_text(json.dumps({"recipe": OLD_KEYS} if inside else OLD_KEYS))
    recipe = load_recipe(str(path), {})
    assert recipe == Recipe.model_validate(CURRENT_KEYS) == Recipe.model_validate(OLD_KEYS)
    written = resolved_json(recipe)
    assert {key: written[key] for key in CURRENT_KEYS} == CURRENT_KEYS
    assert not OLD_KEYS.keys() & written.keys()


@pytest.mark.parametrize("overrides", [{"sweeps": 5}, {"coordinate_descent_passes": 5}])
@pytest.mark.parametrize("fields", [OLD_KEYS, CURRENT_KEYS])
def test_an_override_replaces_a_field_under_either_name(
    tmp_path: Path, fields: dict[str, Any], overrides: dict[str, Any]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(fields))
    recipe = load_recipe(str(path), overrides)
    assert (recipe.asymmetric_calibration, recipe.coordinate_descent_passes) == (0.5, 5)


def test_a_field_under_both_of_its_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    both = {"drift": 0.5, "asymmetric_calibration": 0.5}
    path.write_text(json.dumps(both))
    message = "'drift' is the old name of 'asymmetric_calibration'; give only 'asymmetric_calibration'"
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path), {})
    assert str(error.value) == f"recipe '{path}': {message}"
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(both)


@given(
    recipe=st.builds(
        Recipe,
        bits=st.sampled_from([2, 3, 4, 8]),
        group_size=st.sampled_from(["auto", -1, 8, 128]),
        damping=st.floats(0, 1, exclude_min=True),
        asymmetric_calibration=st.floats(0, 1),
        seed=st.none() | st.integers(0, 2**63 - 1),
    )
)
def test_json_keeps_every_field(recipe: Recipe) -> None:
    assert Recipe.model_validate(json.loads(json.dumps(resolved_json(recipe)))) == recipe
