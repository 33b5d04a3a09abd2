"""A method needs one registry entry: a method that a test registers works everywhere, from the command line to the report."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.command import FAST, quantkit
from quantkit.methods import METHODS
from quantkit.methods.base import InputStats, Method, SolverSettings
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.rtn import rtn
from quantkit.methods.scheme import Scheme

#: Shapes of the Hessians that the toy saw.
SEEN: list[tuple[int, ...]] = []


def _halves(target: Tensor, stats: InputStats | None, scheme: Scheme, settings: SolverSettings) -> QuantizedWeight:
    assert stats is not None
    SEEN.append(tuple(stats.hessian.shape))
    return rtn(target / 2, scheme, settings.dtype)


TOY = Method("toy", calibrates=True, scales_channels=False, compensates_errors=False, quantize=_halves)


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    SEEN.clear()
    with METHODS.registered("toy", TOY, "Halves every weight."):
        yield


def test_every_entry_is_the_method_of_its_name() -> None:
    assert METHODS.choices() == ["rtn", "awq", "gptq", "awq+gptq", "toy"]
    assert all(METHODS[name].name == name for name in METHODS)


def test_quantize_and_inspect_use_the_toy(llama: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    done = quantkit("quantize", llama, "-o", out, "--method", "toy", *FAST, "--json", report, "-q")
    assert done.status == 0, done.err
    assert (64, 64) in SEEN
    made = json.loads(report.read_text())
    assert made["recipe"]["method"] == "toy"
    assert {matrix["method"] for matrix in made["matrices"]} == {"toy"}
    # Half of every weight is lost, which is a quarter of the squared signal.
    assert all(matrix["output_error"] == pytest.approx(0.25, abs=0.03) for matrix in made["matrices"])
    shown = quantkit("inspect", out, "--json", "-")
    assert shown.status == 0, shown.err
    assert json.loads(shown.out)["method"] == "toy"


def test_plan_uses_the_toy(llama: Path, tmp_path: Path) -> None:
    done = quantkit("quantize", llama, "-o", tmp_path / "out", "--method", "toy", *FAST, "--plan", "--json", "-")
    assert done.status == 0, done.err
    assert SEEN
    assert not (tmp_path / "out").exists()


def test_a_recipe_file_uses_the_toy(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{method: toy}")
    done = quantkit("quantize", llama, "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", *FAST, "-q")
    assert done.status == 0, done.err
    assert SEEN


@pytest.mark.parametrize("given", ["option", "recipe"])
def test_an_unknown_method_lists_the_toy_too(llama: Path, tmp_path: Path, given: str) -> None:
    (tmp_path / "recipe.yaml").write_text("{method: best}")
    choice = ("--method", "best") if given == "option" else ("--recipe", tmp_path / "recipe.yaml")
    done = quantkit("quantize", llama, "-o", tmp_path / "out", *choice)
    assert done.status == 2
    words = " ".join(done.err.replace("│", " ").split())
    assert "unknown method 'best'; choose from: rtn, awq, gptq, awq+gptq, toy" in words


def test_recipes_are_read_without_torch() -> None:
    code = (
        "import sys; from quantkit.recipe import load_recipe; from quantkit.methods import METHODS;"
        "load_recipe('gptq-w4', {}); [METHODS.description(name) for name in METHODS];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_toy_needs_no_hessian_factor() -> None:
    settings = SolverSettings(TOY, True, 0.01, 1.0, None, torch.bfloat16)
    assert InputStats(torch.eye(4), None, settings).factor is None
    assert not settings.needs_reference
