"""The examples that users copy fit the command line as it is today."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from quantkit.cli import app

ROOT = Path(__file__).parents[1]


def _commands() -> list[str]:
    """Every `quantkit` command in the workflow."""
    workflow: Any = yaml.safe_load((ROOT / "examples" / "gate.yml").read_text())
    script = "\n".join(step["run"] for step in workflow["jobs"]["gate"]["steps"] if "run" in step)
    parts = [part.strip() for line in script.splitlines() for part in line.split("&&")]
    return [part for part in parts if part.startswith("quantkit ")]


def test_the_workflow_calls_every_step() -> None:
    assert [shlex.split(command)[1] for command in _commands()] == ["quantize", "eval", "eval", "bench", "deploy", "inspect"]


@pytest.mark.parametrize("command", _commands())
def test_commands_are_understood(command: str) -> None:
    """The command is parsed but not run: an unknown option, a missing argument or a wrong type raises."""
    group: Any = typer.main.get_command(app)
    _, verb, *arguments = shlex.split(command)
    context = group.commands[verb].make_context(verb, arguments)
    assert context.params


def test_the_readme_names_it() -> None:
    assert "(examples/gate.yml)" in (ROOT / "README.md").read_text()
