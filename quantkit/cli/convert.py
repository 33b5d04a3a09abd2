"""`quantkit convert`: the same artifact in another format."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import options
from quantkit.cli.choice import choice
from quantkit.cli.verb import verb
from quantkit.formats import FORMATS


@verb(
    example="Example: quantkit convert demo-w4 demo-w4-gptq --format gptq",
    when_interrupted="the same command continues after the last finished shard",
)
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Folder of the quantized model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the converted model. It must not exist yet.")],
    format_: Annotated[str, choice(FORMATS, "--format", help="On-disk format of the new model.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json_file: options.JsonFile = None,
    debug: options.Debug = False,
) -> None:
    """Convert a quantized model to another format without changing a single weight.

    Refused if the new format cannot represent the weights exactly.
    """
    options.require_writable(json_file)

    from quantkit.checkpoint.locate import locate
    from quantkit.cli.progress import Progress
    from quantkit.formats import convert as job

    with Progress(quiet=False, stage="checking") as progress:
        matrices = job.convert(locate(source), out, format_, overwrite=overwrite, advance=progress.advance)
    if str(json_file) != "-":
        typer.echo(f"written: {out} ({matrices} matrices as {format_}, every weight unchanged)")
    options.write_json(json_file, {"out": str(out), "format": format_, "matrices": matrices})
