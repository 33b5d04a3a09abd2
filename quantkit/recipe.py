"""Recipes: validated settings of a quantization run, from `recipes/`, a YAML file, or an artifact's quantkit.json.

Importing this module does not import torch.
"""

import json
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantkit.errors import RecipeError
from quantkit.formats import FORMATS
from quantkit.methods import METHODS
from quantkit.methods.scheme import Scheme
from quantkit.utils.registry import Registry, UnknownNameError
from quantkit.utils.renamed_keys import with_current_keys

Bits = Literal[2, 3, 4, 8]


def _name_in(registry: Registry[Any]) -> Callable[[str], str]:
    """A validator that accepts the names in `registry`, including those registered later."""

    def check(name: str) -> str:
        try:
            return registry.require(name)
        except UnknownNameError as error:
            raise ValueError(str(error)) from None

    return check


def _check_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


def _check_group_size(size: int | Literal["auto"]) -> int | Literal["auto"]:
    if size != "auto" and size != -1 and (size < 8 or size % 8):
        raise ValueError(f"group size {size} is not a multiple of 8, -1 (one scale per row) or auto")
    return size


GroupSize = Annotated[int | Literal["auto"], AfterValidator(_check_group_size)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """Different settings for the matrices whose path matches.

    Attributes:
        match: regular expression, searched in the module's path (`model.layers.3.mlp.down_proj`, `lm_head`).
        skip: leave them in 16 bit.
        bits, group_size, symmetric: replace the recipe's; None keeps the recipe's.
    """

    match: Annotated[str, AfterValidator(_check_regex)]
    skip: bool = False
    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None


class Calibration(_Strict):
    """The calibration text.

    Attributes:
        source: name of a set, path of a .txt / .jsonl / .parquet file, or `hf:DATASET`.
        samples: rows of tokens.
        seq_len: tokens in a row.
    """

    source: str = "builtin"
    samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=512, ge=16)


class Recipe(_Strict):
    """All settings of a run. Equal resolved recipes and equal sources give byte-identical tensors.

    Attributes:
        method: a name in `quantkit.methods.METHODS`.
        bits, group_size, symmetric: the grid; "auto" is the largest of 128, 64, 32, 16 that divides every matrix.
        act_order: quantize columns by descending Hessian diagonal, with static groups, so that no tensor's layout changes.
        damping: fraction of the Hessian's mean diagonal that is added to its diagonal.
        asymmetric_calibration: how strongly weights correct for the error that the layers before them have added to their
            inputs, from 0 (not at all) to 1 (fully).
        coordinate_descent_passes: passes of coordinate descent over scales, zero points and codes after GPTQ. None means one
            pass at 2 and 3 bits and none at 4 and 8 bits, where a pass does not help.
        rotate: spread outliers of activations by Hadamard transforms, so that drafts survive 4-bit activations (see `rotate`);
            quantkit's engine alone runs the result.
        format: on-disk format, a name in `quantkit.formats.FORMATS`.
        calibration: the calibration text.
        seed: picks calibration rows at random; None takes the first rows of the text.
        rules: the first rule that matches a matrix applies.
    """

    method: Annotated[str, AfterValidator(_name_in(METHODS))] = "gptq"
    bits: Bits = 4
    group_size: GroupSize = "auto"
    symmetric: bool = True
    act_order: bool = True
    damping: float = Field(default=0.01, gt=0, le=1)
    asymmetric_calibration: float = Field(default=1.0, ge=0, le=1)
    coordinate_descent_passes: int | None = Field(default=None, ge=0, le=20)
    rotate: bool = False
    format: Annotated[str, AfterValidator(_name_in(FORMATS))] = "compressed-tensors"
    calibration: Calibration = Calibration()
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    rules: tuple[Rule, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _accept_old_keys(cls, fields: Any) -> Any:
        return with_current_keys(fields) if isinstance(fields, Mapping) else fields

    def scheme(self, module: str) -> Scheme | None:
        """How the matrix at `module` is quantized; None where it stays in 16 bit. The group size must be resolved.

        The output head stays in 16 bit unless a rule names it.
        """
        rule = next((rule for rule in self.rules if re.search(rule.match, module)), Rule(match="", skip=module == "lm_head"))
        if rule.skip:
            return None
        size = rule.group_size if rule.group_size is not None else self.group_size
        assert size != "auto", "group size was not resolved"
        symmetric = self.symmetric if rule.symmetric is None else rule.symmetric
        return Scheme(rule.bits or self.bits, size, symmetric)

    @property
    def calibrates(self) -> bool:
        """Whether the method needs calibration data. Imports the method, and with it torch."""
        return METHODS[self.method].calibrates


def builtin_recipes() -> dict[str, str]:
    """Name -> YAML text of every recipe that ships with quantkit."""
    files = resources.files("quantkit.recipes").iterdir()
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in sorted(files, key=str) if f.name.endswith(".yaml")}


def load_recipe(name: str | Recipe, overrides: dict[str, Any]) -> Recipe:
    """A recipe with some of its fields replaced.

    Args:
        name: a built-in's name, a YAML file, an artifact's quantkit.json, or a recipe.
        overrides: field -> value; `calibration` may be a partial dict.

    Raises:
        RecipeError: not found, not YAML, or a field is wrong (which one, and what is allowed).
    """
    fields, label = (resolved_json(name), "Recipe") if isinstance(name, Recipe) else (_fields(name), f"recipe '{name}'")
    calibration = fields.get("calibration")
    merged = (calibration if isinstance(calibration, dict) else {}) | overrides.get("calibration", {})
    overrides = overrides | ({"calibration": merged} if merged else {})
    try:
        fields = with_current_keys(fields) | with_current_keys(overrides)
    except ValueError as error:
        raise RecipeError(f"recipe '{name}': {error}") from None
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{label}: {where}: {message} (got {first['input']!r:.100})") from None


def recorded_computing(name: str) -> dict[str, Any]:
    """The recorded "threads", "matmul" and "hessian" of the run whose quantkit.json is given as a recipe, as far as valid.

    Runs that recorded no "hessian" multiplied Hessians in float32.
    """
    path = Path(name)
    if path.suffix != ".json":
        return {}
    versions = json.loads(path.read_text(encoding="utf-8")).get("versions")
    if not isinstance(versions, dict):
        return {}
    threads, matmul = str(versions.get("threads")), versions.get("matmul")
    known: dict[str, Any] = {"threads": int(threads)} if re.fullmatch(r"[1-9]\d{0,2}", threads) else {}
    if matmul in ("float32", "bfloat16", "float16"):
        known["matmul"] = matmul
        known["hessian"] = "bfloat16" if versions.get("hessian") == "bfloat16" else "float32"
    return known


def _fields(name: str) -> dict[str, Any]:
    builtin = builtin_recipes()
    path = Path(name)
    try:
        text = builtin[name] if name in builtin else path.read_text(encoding="utf-8")
        fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(f"recipe '{name}' is neither a file nor one of: {', '.join(builtin)}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise RecipeError(f"{path}: cannot be read as {kind} ({' '.join(str(error).split())})") from None
    if isinstance(fields, dict) and path.suffix == ".json":
        fields = fields.get("recipe")
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: holds no recipe (a mapping of fields such as method, bits, group_size)")
    return {k: v for k, v in fields.items() if k != "description"}


def resolved_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON data, every default written out."""
    data: dict[str, Any] = json.loads(recipe.model_dump_json())
    return data
