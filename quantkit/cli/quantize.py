"""`quantkit quantize`: a checkpoint in, an artifact out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli import complete, options
from quantkit.cli.choice import choice
from quantkit.cli.verb import verb
from quantkit.formats import FORMATS
from quantkit.methods import METHODS


@verb(
    example="Example: quantkit quantize demo -o demo-w4 --recipe awq+gptq-w4   (then: quantkit eval demo-w4 --baseline demo)",
    when_interrupted="the same command continues after the last finished block",
    when_out_of_memory="lower --seq-len or --max-memory, or use another --device",
)
def quantize(
    model: options.Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the quantized model. It must not exist yet.")],
    method: Annotated[str | None, choice(METHODS, help="Quantization method. rtn: round to nearest.")] = None,
    bits: Annotated[int | None, typer.Option(metavar="2|3|4|8", help="Bits per weight.")] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="Neighboring weights in a row that share one scale. -1: the whole row.")
    ] = None,
    sym: Annotated[
        bool | None,
        typer.Option("--sym/--asym", help="Symmetric: the zero point is fixed. Asymmetric: each group has its own."),
    ] = None,
    act_order: Annotated[
        bool | None, typer.Option(help="For gptq: quantize the columns with the largest activations first.")
    ] = None,
    rotate: Annotated[
        bool | None,
        typer.Option(help="Apply a Hadamard rotation (QuaRot), so that drafts with 4-bit activations are accepted."),
    ] = None,
    format_: Annotated[str | None, choice(FORMATS, "--format", help="On-disk format of the quantized weights.")] = None,
    recipe: Annotated[
        str,
        typer.Option(
            autocompletion=complete.recipes,
            help="Recipe: a name (see `quantkit recipes`), a YAML file, or the quantkit.json of another model.",
        ),
    ] = "gptq-w4",
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            autocompletion=complete.text_sets,
            help="Calibration text: a name (see `quantkit calib`), a .txt, .jsonl or .parquet file, or hf:DATASET.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(metavar="N", help="Number of calibration sequences.")] = None,
    seq_len: Annotated[int | None, typer.Option(metavar="N", help="Tokens per calibration sequence.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Draw the calibration sequences at random with this seed. Default: take the first ones."
        ),
    ] = None,
    device: options.Device = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for activations, e.g. 8GiB; the rest goes to a file. Default: half of what is free."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists, or an unfinished run with other options.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Predict memory, disk space, time and which engines load the result. Write nothing.")
    ] = False,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print a line for each quantized matrix.")] = False,
    debug: options.Debug = False,
) -> None:
    """Quantize MODEL to 2, 3, 4 or 8 bits and write an artifact that vLLM, SGLang and transformers load.

    Options override fields of the recipe.

    If the run is killed, the same command continues after the last finished block.
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
