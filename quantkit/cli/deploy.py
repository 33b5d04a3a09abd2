"""`quantkit deploy`: serve a model with vLLM or SGLang."""

import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import options
from quantkit.cli.choice import choice_argument
from quantkit.cli.verb import verb
from quantkit.errors import QuantkitError
from quantkit.formats.servers import SERVERS


@verb(example="Example: quantkit deploy vllm demo-w4 --tensor-parallel 3 -- --max-model-len 4096")
def deploy(
    engine: Annotated[str, choice_argument(SERVERS, help="Engine that will serve the model.")],
    model: options.Model,
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Further options, passed to the engine unchanged.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs to split every matrix across.")] = 1,
    run: Annotated[bool, typer.Option("--run", help="Run the command instead of printing it.")] = False,
    json_file: options.JsonFile = None,
    debug: options.Debug = False,
) -> None:
    """Check that vLLM or SGLang can load MODEL, and print the command that serves it."""
    options.require_writable(json_file)

    from quantkit.checkpoint.locate import locate
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.formats import deploy as job

    folder = locate(model)
    named = str(folder) if model == "demo" or Path(model).expanduser().is_dir() else model
    found = job.deployment(Checkpoint(folder), named, engine, tensor_parallel, extra or ())
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    options.write_json(json_file, {"engine": engine, "command": found.command, "notes": found.notes})
    if run:
        _become(engine, found.command)
    elif str(json_file) != "-":
        typer.echo(shlex.join(found.command))


def _become(engine: str, command: list[str]) -> None:
    """Replace this process by the engine, so that signals and exit status are the engine's own.

    Raises:
        QuantkitError: the engine is not installed.
    """
    program = sys.executable if command[0] == "python" else shutil.which(command[0])
    if program is None or find_spec(engine) is None:
        raise QuantkitError(
            f"{engine} is not installed here; install it, or leave out --run and run the printed command elsewhere"
        )
    sys.stdout.flush()
    os.execv(program, [program, *command[1:]])
