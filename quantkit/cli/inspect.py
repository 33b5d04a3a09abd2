"""`quantkit inspect`: what a model folder holds, without loading it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import options
from quantkit.cli.verb import verb
from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    from quantkit.checkpoint.reader import Checkpoint


@verb(example="Example: quantkit inspect demo-w4")
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Model folder (quantized or not), Hub id, or 'demo'.")],
    json_file: options.JsonFile = None,
    debug: options.Debug = False,
) -> None:
    """Show what a model folder holds: architecture, format, schemes, size, and how it was made. Reads headers only."""
    options.require_writable(json_file)

    from quantkit.checkpoint.locate import locate
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.cli import tables

    checkpoint = Checkpoint(locate(path))
    facts = _facts(checkpoint)
    rows = [(name, str(value)) for name, value in facts.items() if not isinstance(value, dict | list)]
    rows += [(scheme, f"{count} matrices") for scheme, count in facts["schemes"].items()]
    rows += tables.engine_rows(facts["engines"])
    options.console(json_file).print(tables.pairs(str(checkpoint.folder), rows))
    options.write_json(json_file, facts | {"engines": [engine.__dict__ for engine in facts["engines"]]})


def _facts(checkpoint: "Checkpoint") -> dict[str, Any]:
    from quantkit.cli import tables
    from quantkit.formats.artifact import PackedReader, bits_per_weight

    facts: dict[str, Any] = {
        "architecture": checkpoint.config["model_type"],
        "shards": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "size": tables.size(sum(file.stat().st_size for file in checkpoint.files)),
        "bits per weight": round(bits_per_weight(checkpoint), 3),
        "format": "dense",
        "schemes": {},
        "engines": [],
    }
    if "quantization_config" in checkpoint.config:
        packed = PackedReader(checkpoint)
        schemes = [packed.scheme(module) for module in packed.modules]
        facts["format"] = packed.format.name
        facts["schemes"] = {str(scheme): schemes.count(scheme) for scheme in dict.fromkeys(schemes)}
        facts["engines"] = packed.engines()
        if packed.online:
            facts["online"] = f"Hadamard transform of the inputs of down_proj, in blocks of {packed.online.block}"
    made: Path = checkpoint.folder / "quantkit.json"
    if made.is_file():
        facts |= _history(made)
    return facts


def _history(made: Path) -> dict[str, Any]:
    """How the artifact was made."""
    from quantkit.checkpoint.reader import read_json

    report = read_json(made)
    try:
        return {
            "method": report["recipe"]["method"],
            "mean output error": f"{report['totals']['output_error']:.2e}",
            "worst matrix": report["worst"][0],
        }
    except (KeyError, TypeError, ValueError, IndexError):
        raise CheckpointError(f"{made}: is not a report that quantkit wrote; delete or restore it") from None
