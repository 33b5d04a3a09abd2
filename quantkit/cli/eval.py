"""`quantkit eval`: perplexity, divergence from a baseline, gates for CI; speed; tasks."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.checkpoint.locate import local_folder
from quantkit.cli import complete, options
from quantkit.cli.engine_options import EngineOptions
from quantkit.cli.verb import verb
from quantkit.errors import RecipeError
from quantkit.runtime.kv_cache.dtypes import KV_DTYPES, require_kv_dtype
from quantkit.runtime.kv_cache.eviction import FULL, Budget

if TYPE_CHECKING:
    from quantkit.evaluation.run import EvalReport


@verb(
    example="Example: quantkit eval demo-w4 --baseline demo --max-ppl-increase 5% --max-kl 0.2   "
    "(exit status 1 if a gate fails)",
    when_out_of_memory="lower --seq-len, or use another --device",
)
def evaluate(
    model: options.Model,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Model to compare with, usually the original before quantization.")
    ] = None,
    text: Annotated[
        str,
        typer.Option(
            autocompletion=complete.text_sets,
            help="Evaluation text: a name (see `quantkit calib`), a .txt, .jsonl or .parquet file, or hf:DATASET.",
        ),
    ] = "builtin",
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of text to evaluate. They do not overlap.")] = 10,
    seq_len: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens per window.")] = 1024,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT", help="Gate: exit with status 1 if perplexity is higher than the baseline's by more, e.g. 2%."
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="NATS", help="Gate: exit with status 1 if the mean KL divergence from the baseline is larger."
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            "--kv-dtype",
            "--kv-cache-dtype",
            metavar="TYPE",
            autocompletion=complete.names(KV_DTYPES),
            help=f"Evaluate with a KV cache of this type: {KV_DTYPES.alternatives()}.",
        ),
    ] = None,
    kv_policy: options.KvPolicy = FULL,
    kv_budget: options.KvBudget = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure speed and memory instead of quality.")] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="Run these tasks of the lm-evaluation-harness instead, e.g. hellaswag,arc_easy."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="For --tasks: documents per task, at most.")] = None,
    task_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For --tasks: folder with additional tasks (YAML).")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, metavar="N", help="For --tasks: examples per prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="For --tasks: put prompts into the model's chat template.")] = False,
    write_card: Annotated[bool, typer.Option("--write-card", help="Record the numbers in MODEL's model card.")] = False,
    device: options.Device = "auto",
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure MODEL: perplexity, bits per weight and size; with --baseline KL divergence and top-1 agreement too.

    --speed measures speed and memory instead; --tasks runs benchmark tasks instead.

    Perplexity = exp(mean negative log-likelihood). The first token of each window is not scored.
    """
    options.require_writable(json_file)
    increase = options.fraction(max_ppl_increase, "--max-ppl-increase")
    gated = increase is not None or max_kl is not None
    if baseline is None and gated:
        raise RecipeError("--max-ppl-increase and --max-kl compare with a baseline; name one with --baseline")
    if write_card:
        if baseline is None or speed or tasks is not None:
            raise RecipeError(
                "--write-card records how far MODEL is from its original; name that with --baseline, and leave "
                "--speed and --tasks out"
            )
        if not Path(model).is_dir():
            raise RecipeError(f"--write-card: {model} is no local folder; download the artifact into one first")
        from quantkit.formats.model_card import require_measurable

        require_measurable(Path(model))
    if kv_dtype is not None:
        require_kv_dtype(kv_dtype)
    if speed and (gated or tasks is not None):
        raise RecipeError("--speed does not measure quality, so it excludes gates and --tasks; run eval twice")
    if speed and (kv_dtype, kv_policy, kv_budget) != (None, FULL, None):
        raise RecipeError(
            "--speed always uses a full KV cache of the model's own type; "
            "leave --kv-dtype, --kv-policy and --kv-budget out, or --speed"
        )
    if tasks is not None and gated:
        raise RecipeError("--tasks measures neither perplexity nor KL divergence, so it excludes those gates; run eval twice")
    if tasks is None and (limit, task_dir, num_fewshot, chat) != (None, None, None, False):
        raise RecipeError("--limit, --task-dir, --num-fewshot and --chat apply to --tasks only; name tasks with --tasks")
    for name in (model, baseline):
        if name is not None:
            local_folder(name)  # refuses a wrong name before torch is imported
    if speed:
        _speed(model, baseline, device, json_file, quiet=quiet)
        return
    if tasks is not None:
        from quantkit.cli.eval_tasks import evaluate_tasks

        models = {} if baseline is None else {"baseline": baseline}
        engine = EngineOptions(device, kv_dtype=kv_dtype or "auto", kv_policy=kv_policy, kv_budget=kv_budget)
        wanted = {"names": tasks.split(","), "limit": limit, "folder": task_dir, "num_fewshot": num_fewshot, "chat": chat}
        evaluate_tasks(models | {"model": model}, engine, wanted, json_file, quiet=quiet)
        return
    budget = Budget(kv_policy, kv_budget)

    from quantkit.checkpoint.locate import locate
    from quantkit.cli import tables
    from quantkit.cli.progress import Progress
    from quantkit.evaluation.run import KERNEL_TOLERANCE, EvalRequest, run_evaluation
    from quantkit.utils.device import resolve_device

    request = EvalRequest(
        model=locate(model),
        baseline=None if baseline is None else locate(baseline),
        text=text,
        windows=windows,
        seq_len=seq_len,
        device=resolve_device(device),
        kv_dtype=kv_dtype,
        budget=budget,
    )
    with Progress(quiet=quiet) as progress:
        report = run_evaluation(request, progress.advance)
    options.console(json_file, quiet=quiet).print(tables.eval_table(report, model, baseline))
    if report.kernel_difference is not None and not abs(report.kernel_difference) <= KERNEL_TOLERANCE:
        typer.echo(
            f"warning: the packed kernels move the perplexity by {report.kernel_difference:+.1e} from that of the dequantized "
            f"weights, more than the {KERNEL_TOLERANCE:.0e} that rounding explains; generated text is affected as well",
            err=True,
        )
    if write_card and baseline is not None:
        from quantkit.evaluation.card import write_card as write_measured

        write_measured(Path(model), report, baseline)
    failures = _failures(report, increase, max_kl)
    options.write_json(json_file, report.to_json() | {"failed_gates": failures})
    for failure in failures:
        typer.echo(f"gate failed: {failure}", err=True)
    if failures:
        raise typer.Exit(1)


def _speed(model: str, baseline: str | None, device: str, json_file: Path | None, *, quiet: bool) -> None:
    """Measure the speed of the models one after another, each in a process of its own."""
    from quantkit.checkpoint.locate import locate
    from quantkit.cli import tables
    from quantkit.cli.progress import Progress
    from quantkit.evaluation.speed import measure_in_subprocess
    from quantkit.utils.device import resolve_device

    names = [name for name in (baseline, model) if name is not None]
    reports = []
    with Progress(quiet=quiet) as progress:
        for number, name in enumerate(names, start=1):
            progress.advance(f"measuring {name} (model {number} of {len(names)}, about a minute each)", 0, 0)
            reports.append(measure_in_subprocess(locate(name), resolve_device(device)))
    options.console(json_file, quiet=quiet).print(tables.speed_table(reports))
    options.write_json(json_file, dict(zip(("baseline", "model")[-len(reports) :], map(asdict, reports), strict=True)))


def _failures(report: "EvalReport", max_increase: float | None, max_kl: float | None) -> list[str]:
    failures = []
    if max_increase is not None and report.ppl_increase is not None and not report.ppl_increase <= max_increase:
        failures.append(f"perplexity rose by {report.ppl_increase:.2%}, the limit is {max_increase:.2%}")
    kl = report.model.metrics.kl_mean
    if max_kl is not None and kl is not None and not kl <= max_kl:
        failures.append(f"mean KL divergence is {kl:.4f}, the limit is {max_kl:.4f}")
    return failures
