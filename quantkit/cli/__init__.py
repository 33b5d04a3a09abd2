"""The command line: one file a verb; the only place where errors become text and exit codes.

Exit status: 0 done, 1 a gate (`eval --max-ppl-increase`, `--max-kl`) or a request of `generate` failed, 2 bad input.
"""

import errno
import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

import quantkit
from quantkit.cli import bench, calib, convert, deploy, eval, generate, inspect, quantize, recipes, serve
from quantkit.errors import QuantkitError
from quantkit.utils.resources import is_out_of_memory, return_freed_memory

app = typer.Typer(
    name="quantkit",
    help="Make large language models small and fast, and prove that they still work.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
#: Verb -> where it goes on when it was interrupted.
_GOES_ON = {
    "quantize": "; the same command goes on after the last finished block",
    "convert": "; the same command goes on after the last finished shard",
}
#: Verb -> what lowers its need of memory.
_LESS_MEMORY = {
    "quantize": ", lower --seq-len or --max-memory, or use another --device",
    "eval": ", lower --seq-len, or use another --device",
    "generate": ", lower --kv-memory or --max-batch, or use another --device",
    "serve": ", lower --kv-memory or --max-batch, or use another --device",
}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantkit {quantkit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Make large language models small and fast, and prove that they still work."""


def _guarded(name: str, verb: Callable[..., None]) -> Callable[..., None]:
    """The verb of that name, ending in one line where the user can mend what went wrong."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except (QuantkitError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
            message, status = _explain(error, name)
            if message is None:
                raise
            if "--debug" in sys.argv:
                traceback.print_exception(error)
            typer.echo(f"error: {' '.join(message.split())}", err=True)
            raise typer.Exit(status) from None

    return run


def _explain(error: BaseException, verb: str) -> tuple[str | None, int]:
    """What to tell the user of a verb and the exit status; None for our own bugs."""
    if isinstance(error, QuantkitError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return f"{error.filename or 'disk'}: {error.strerror}; free space or choose another place", 2
    if is_out_of_memory(error):
        return f"memory ran out; free some{_LESS_MEMORY.get(verb, '')}, and try again", 2
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{_GOES_ON.get(verb, '')}", 130
    return None, 1


for _name, _verb, _example in (
    ("quantize", quantize.quantize, quantize.EXAMPLE),
    ("eval", eval.evaluate, eval.EXAMPLE),
    ("generate", generate.generate, generate.EXAMPLE),
    ("serve", serve.serve, serve.EXAMPLE),
    ("bench", bench.bench, bench.EXAMPLE),
    ("deploy", deploy.deploy, deploy.EXAMPLE),
    ("inspect", inspect.inspect, inspect.EXAMPLE),
    ("convert", convert.convert, convert.EXAMPLE),
    ("recipes", recipes.recipes, recipes.EXAMPLE),
    ("calib", calib.calib, calib.EXAMPLE),
):
    app.command(_name, epilog=_example)(_guarded(_name, _verb))


def main() -> None:
    """Entry point."""
    return_freed_memory()
    app()
