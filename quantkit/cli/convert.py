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
    when_interrupted="the same command goes on after the last finished shard",
)
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Quantized model folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new artifact; must not exist.")],
    format_: Annotated[str, choice(FORMATS, "--format", help="On-disk format.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    json_file: options.JsonFile = None,
    debug: options.Debug = False,
) -> None:
    """Change an artifact's format without changing a single weight; refused where the format cannot hold the grid."""
    options.require_writable(json_file)

    from quantkit.checkpoint.locate import locate
    from quantkit.formats import convert as job

    matrices = job.convert(locate(source), out, format_, overwrite=overwrite)
    if str(json_file) != "-":
        typer.echo(f"written: {out} ({matrices} matrices as {format_}, every weight unchanged)")
    options.write_json(json_file, {"out": str(out), "format": format_, "matrices": matrices})
