"""`quantkit quantize`: a checkpoint in, an artifact out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli import options
from quantkit.cli.choice import choice
from quantkit.cli.verb import verb
from quantkit.formats import FORMATS
from quantkit.methods import METHODS


@verb(
    example="Example: quantkit quantize demo -o demo-w4 --recipe awq+gptq-w4   (then: quantkit eval demo-w4 --baseline demo)",
    when_interrupted="the same command goes on after the last finished block",
    when_out_of_memory="lower --seq-len or --max-memory, or use another --device",
)
def quantize(
    model: options.Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the artifact; must not exist.")],
    method: Annotated[str | None, choice(METHODS, help="Quantization method.")] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1: a scale a row.")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Fixed or searched zero points.")] = None,
    act_order: Annotated[bool | None, typer.Option(help="Quantize columns by falling activation.")] = None,
    rotate: Annotated[bool | None, typer.Option(help="Rotate activations, for drafts with 4-bit ones.")] = None,
    format_: Annotated[str | None, choice(FORMATS, "--format", help="On-disk format.")] = None,
    recipe: Annotated[str, typer.Option(help="A recipe's name (see `quantkit recipes`), a YAML file, or a quantkit.json.")] = (
        "gptq-w4"
    ),
    calib: Annotated[str | None, typer.Option(help="Text: a set's name, a file, or hf:DATASET.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration rows.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a row.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draw rows at random; without it, the text's first.")] = None,
    device: options.Device = "auto",
    max_memory: Annotated[str | None, typer.Option(help="For activations, e.g. 8GiB; beyond it they go to a file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, or an unfinished run that differs.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Predict memory, disk, time and loaders; change nothing.")] = False,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="A line for each matrix.")] = False,
    debug: options.Debug = False,
) -> None:
    """Quantize MODEL to 2, 3, 4 or 8 bits and write an artifact that vLLM, SGLang and transformers load.

    Options override the recipe. A killed run goes on where it stopped when the same command is given again.
    """
    given: dict[str, Any] = {
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "symmetric": sym,
        "act_order": act_order,
        "rotate": rotate,
        "format": format_,
        "seed": seed,
    }
    calibration = {"source": calib, "samples": samples, "seq_len": seq_len}
    overrides = {name: value for name, value in given.items() if value is not None}
    overrides["calibration"] = {name: value for name, value in calibration.items() if value is not None}
    options.require_writable(json_file)
    from quantkit.recipe import load_recipe, recorded_computing

    resolved = load_recipe(recipe, overrides)
    memory = None if max_memory is None else options.byte_size(max_memory, "--max-memory")

    from quantkit.checkpoint.locate import locate
    from quantkit.cli import tables
    from quantkit.cli.progress import RunProgress
    from quantkit.quantization.distributed import init_distributed
    from quantkit.quantization.estimate import estimate_run
    from quantkit.quantization.run import QuantizeRequest, join_as_worker, quantize_model
    from quantkit.utils.device import resolve_device
    from quantkit.utils.resources import available_memory

    with init_distributed() as process_group:
        request = QuantizeRequest(
            folder=locate(model),
            out=out,
            recipe=resolved,
            device=process_group.local_device(resolve_device(device)),
            max_memory=available_memory() // 2 // process_group.size if memory is None else memory,
            overwrite=overwrite,
            compute_settings=recorded_computing(recipe),
        )
        if process_group.rank:
            if not plan:
                join_as_worker(request, RunProgress(quiet=True, verbose=False), process_group)
            return
        console = options.console(json_file, quiet=quiet)
        if plan:
            prediction = estimate_run(request)
            console.print(tables.plan_table(prediction))
            options.write_json(json_file, prediction.to_json())
            return
        with RunProgress(quiet=quiet, verbose=verbose) as progress:
            report = quantize_model(request, progress, process_group)
    for table in tables.run_tables(report, out):
        console.print(table)
    options.write_json(json_file, report.to_json())
