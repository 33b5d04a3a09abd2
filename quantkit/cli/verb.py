"""A verb of the command line: its function, its example, and what the user is told when something ends it early."""

import errno
import functools
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from quantkit.errors import QuantkitError
from quantkit.utils.resources import is_out_of_memory

_ERRNOS_OF_THE_USER = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@dataclass(frozen=True)
class Verb:
    """A verb. `verb` makes one of a function.

    Attributes:
        function: its parameters are the verb's arguments and options, its docstring is the verb's help.
        example: one command line, shown below the help.
        when_interrupted: what Ctrl-C leaves behind, if the user can build on it.
        when_out_of_memory: options that lower the need of memory.
    """

    function: Callable[..., None]
    example: str
    when_interrupted: str = ""
    when_out_of_memory: str = ""

    @property
    def callback(self) -> Callable[..., None]:
        """The function; an error that the user can mend becomes one line on stderr and an exit status."""

        @functools.wraps(self.function)
        def run(**given: Any) -> None:
            try:
                self.function(**given)
            except (QuantkitError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
                message, status = self.explain(error)
                if message is None:
                    raise
                if given.get("debug"):
                    traceback.print_exception(error)
                typer.echo(f"error: {' '.join(message.split())}", err=True)
                raise typer.Exit(status) from None

        return run

    def explain(self, error: BaseException) -> tuple[str | None, int]:
        """What to tell the user, and the exit status. None as the message: a mistake of ours, which keeps its traceback."""
        if isinstance(error, QuantkitError):
            return str(error), error.exit_code
        if isinstance(error, OSError) and error.errno in _ERRNOS_OF_THE_USER:
            return f"{error.filename or 'disk'}: {error.strerror}; free space or choose another place", 2
        if is_out_of_memory(error):
            advice = ", ".join(("free some", *filter(None, [self.when_out_of_memory])))
            return f"memory ran out; {advice}, and try again", 2
        if isinstance(error, KeyboardInterrupt):
            return "; ".join(("interrupted", *filter(None, [self.when_interrupted]))), 130
        return None, 1


def verb(*, example: str, when_interrupted: str = "", when_out_of_memory: str = "") -> Callable[[Callable[..., None]], Verb]:
    """Decorator: the function is a verb. The arguments are fields of `Verb`."""
    return lambda function: Verb(function, example, when_interrupted, when_out_of_memory)
