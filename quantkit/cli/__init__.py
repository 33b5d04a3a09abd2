"""The command line: one file a verb; the only place where errors become text and exit codes.

Exit status: 0 done, 1 a gate failed (`eval --max-ppl-increase`, `--max-kl`), 2 bad input.
"""

import errno
import sys

import typer

import quantkit
from quantkit.cli import calib, convert, eval, inspect, quantize, recipes
from quantkit.errors import QuantkitError
from quantkit.usage import return_freed_memory

app = typer.Typer(
    name="quantkit",
    help="Make large language models small and fast, and prove that they still work.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantkit {quantkit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Make large language models small and fast, and prove that they still work."""


app.command("quantize", epilog=quantize.EXAMPLE)(quantize.quantize)
app.command("eval", epilog=eval.EXAMPLE)(eval.evaluate)
app.command("inspect", epilog=inspect.EXAMPLE)(inspect.inspect)
app.command("convert", epilog=convert.EXAMPLE)(convert.convert)
app.command("recipes", epilog=recipes.EXAMPLE)(recipes.recipes)
app.command("calib", epilog=calib.EXAMPLE)(calib.calib)


def main() -> None:
    """Entry point: run a command, show what the user can mend in one line."""
    return_freed_memory()
    try:
        app()
    except QuantkitError as error:
        _fail(error, str(error), error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        _fail(error, f"{error.filename or 'disk'}: {error.strerror}; free space or choose another place", 2)
    except KeyboardInterrupt as error:
        _fail(error, "interrupted; the same command goes on after the last finished block", 130)


def _fail(error: BaseException, message: str, status: int) -> None:
    if "--debug" in sys.argv:
        raise error
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(status)
