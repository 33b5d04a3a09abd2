"""Commands that need no model start at once: in a fresh interpreter they import none of the large libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.command import REPORT_IMPORTS, imported_by
from quantkit.cli.verbs import VERBS

LARGE = ("torch", "transformers", "datasets", "huggingface_hub", "numpy")


@pytest.mark.parametrize("arguments", ["--version", "--help", "recipes", "calib"])
def test_listings_import_no_large_library(arguments: str) -> None:
    assert imported_by(arguments).isdisjoint(LARGE)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_imports_no_large_library(verb: str) -> None:
    modules = imported_by(verb, "--help")
    assert modules.isdisjoint(LARGE)
    assert f"quantkit.cli.{verb}" in modules


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_imports_no_large_library(verb: str) -> None:
    assert imported_by(verb, "--no-such-option", status=2).isdisjoint(LARGE)


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-verb",),
        ("quantize",),
        ("quantize", "model", "-o", "out", "--method", "best"),
        ("quantize", "model", "-o", "out", "--recipe", "no-such-recipe"),
        ("quantize", "model", "-o", "out", "--bits", "5"),
        ("quantize", "model", "-o", "out", "--max-memory", "lots"),
        ("convert", "in", "out", "--format", "zip"),
        ("generate", "model"),
        ("generate", "model", "x", "--draft-len", "4"),
        ("generate", "model", "x", "--kv-memory", "lots"),
        ("generate", "model", "x", "--spec", "fast"),
        ("generate", "model", "x", "--kv-cache-dtype", "int5"),
        ("generate", "model", "x", "--kv-policy", "lru"),
        ("serve", "model", "--port", "many"),
        ("eval", "model", "--kv-dtype", "int5"),
        ("inspect", "no/such/folder"),
        ("generate", "no/such/folder", "x"),
        ("serve", "no/such/folder"),
        ("eval", "no/such/folder"),
        ("eval", "no/such/folder", "--speed"),
        ("deploy", "engine", "model"),
        ("eval", "model", "--max-kl", "0.1"),
        ("bench", "http://localhost", "--rate", "0"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_import_no_large_library(arguments: tuple[str, ...]) -> None:
    assert imported_by(*arguments, status=2).isdisjoint(LARGE)


def test_a_wrong_recipe_imports_no_large_library(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("bits: 4\nbites: 4\n")
    assert imported_by("quantize", "model", "-o", "out", "--recipe", tmp_path / "wrong.yaml", status=2).isdisjoint(LARGE)


def test_help_of_the_program_imports_no_verb() -> None:
    modules = imported_by("--help")
    assert not any(f"quantkit.cli.{verb}" in modules for verb in VERBS)


#: A verb of a module outside the package, registered before the program runs.
TOY = """
import sys, types
from typing import Annotated
import typer
from quantkit.cli.verb import verb
from quantkit.cli.verbs import VERBS

@verb(example="Example: quantkit toy 3")
def toy(number: Annotated[int, typer.Argument(help="A number.")], debug: bool = False) -> None:
    \"\"\"Double a number.\"\"\"
    if number < 0:
        raise MemoryError
    print(2 * number)

sys.modules["toys"] = types.ModuleType("toys")
sys.modules["toys"].toy = toy
VERBS.register("toy", "toys:toy", "Double a number.")
"""


class TestAVerbIsOneFileAndOneLine:
    """The registry is all that knows a verb."""

    @staticmethod
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", TOY + "from quantkit.cli import main; main()", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_it_runs(self) -> None:
        done = self.run("toy", "21")
        assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")

    def test_its_errors_are_one_line(self) -> None:
        done = self.run("toy", "--", "-1")
        assert (done.returncode, done.stderr) == (2, "error: memory ran out; free some, and try again\n")

    def test_it_is_listed_and_has_its_help(self) -> None:
        assert "Double a number." in self.run("--help").stdout
        assert "Example: quantkit toy 3" in self.run("toy", "--help").stdout

    def test_it_imports_no_large_library(self) -> None:
        assert imported_by("toy", "1", program=TOY + REPORT_IMPORTS).isdisjoint(LARGE)


@pytest.mark.parametrize(("policy", "spins"), [(None, "1000"), ("ACTIVE", "None")])
def test_idle_threads_sleep_early_unless_the_user_has_a_policy(policy: str | None, spins: str) -> None:
    program = (
        "import os\nfrom quantkit.cli import main\ntry:\n    main()\nfinally:\n    print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, "-c", program, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == spins
