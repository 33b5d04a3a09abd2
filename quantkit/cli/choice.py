"""Options and arguments whose values are the names in a registry."""

from typing import Any

import typer

from quantkit.cli import complete
from quantkit.utils.registry import Registry, UnknownNameError


def choice(registry: Registry[Any], *names: str, help: str) -> Any:
    """A typer option whose value must be a name in `registry`. Help and errors list the names; nothing is imported.

    Args:
        registry: what may be chosen.
        names: the option's names, such as "--format"; by default the parameter's name.
        help: the option's help text.
    """
    return typer.Option(*names, help=help, **_names_of(registry))


def choice_argument(registry: Registry[Any], *, help: str) -> Any:
    """A typer argument whose value must be a name in `registry`; see `choice`."""
    return typer.Argument(help=help, **_names_of(registry))


def _names_of(registry: Registry[Any]) -> dict[str, Any]:
    """What an option and an argument have in common."""

    def check(name: str | None) -> str | None:
        try:
            return None if name is None else registry.require(name)
        except UnknownNameError as error:
            raise typer.BadParameter(str(error)) from None

    return {"callback": check, "metavar": "|".join(registry), "autocompletion": complete.names(registry)}
