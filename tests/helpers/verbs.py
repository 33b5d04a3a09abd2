"""The command line's own parser, for tests that ask which options there are."""

from typing import Any

import typer

from quantkit.cli import app


def group() -> Any:
    """The program, a `click.Group`."""
    return typer.main.get_command(app)


def verbs() -> list[str]:
    """Names of all verbs."""
    return list(group().commands)


def command(verb: str) -> Any:
    """The `click.Command` of a verb, with its options."""
    return group().commands[verb].make_context(verb, [], resilient_parsing=True).command


def options(command: Any) -> set[str]:
    """Every spelling of every option of a command."""
    spellings = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return {option for option in spellings if option.startswith("-")} | {"-h", "--help"}
