"""`quantkit calib`: the built-in texts for calibration and evaluation."""

from quantkit.cli import options
from quantkit.cli.verb import verb


@verb(example="Example: quantkit quantize demo -o out --calib wikitext2   (or a .txt, .jsonl or .parquet file, or hf:DATASET)")
def calib(json_file: options.JsonFile = None) -> None:
    """List the built-in text sets. Pass one of the names to `quantize --calib` or `eval --text`."""
    from rich.table import Table

    from quantkit.data.corpus import text_sets

    options.require_writable(json_file)
    table = Table("set", "dataset", "split", "column", "chat", "licence", "description")
    sets = text_sets()
    for name, entry in sets.items():
        dataset = entry.dataset + (f" ({entry.config})" if entry.config else "")
        chat = "yes" if entry.chat else "no"
        table.add_row(name, dataset, entry.split, entry.column, chat, entry.licence, entry.description)
    options.console(json_file).print(table)
    options.write_json(json_file, {name: entry.model_dump() for name, entry in sets.items()})
