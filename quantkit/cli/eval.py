"""`quantkit eval`: perplexity, divergence from a baseline, gates for CI; speed; tasks."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import options
from quantkit.cli.engine_options import EngineOptions
from quantkit.cli.verb import verb
from quantkit.errors import RecipeError
from quantkit.runtime.kv_cache.dtypes import KV_DTYPES
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
    baseline: Annotated[str | None, typer.Option(metavar="REF", help="Model to compare with, usually the original.")] = None,
    text: Annotated[str, typer.Option(help="Text: a set's name, a file, or hf:DATASET.")] = "builtin",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text, which do not overlap.")] = 10,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    max_ppl_increase: Annotated[str | None, typer.Option(help="Gate: largest perplexity increase, e.g. 2%.")] = None,
    max_kl: Annotated[float | None, typer.Option(min=0, help="Gate: largest mean KL divergence, nats.")] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help=f"Run through the engine's KV cache of this type: {KV_DTYPES.alternatives()}.")
    ] = None,
    kv_policy: options.KvPolicy = FULL,
    kv_budget: options.KvBudget = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure speed and memory instead of quality.")] = False,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Run tasks of the lm-evaluation-harness instead.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of --tasks: documents of each at most.")] = None,
    task_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Of --tasks: a folder of more tasks (YAML).")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Of --tasks: examples in each prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Of --tasks: put prompts into the chat template.")] = False,
    write_card: Annotated[bool, typer.Option("--write-card", help="Record the numbers in MODEL's model card.")] = False,
    device: options.Device = "auto",
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure perplexity, KL divergence from a baseline, top-1 agreement, bits per weight and size; or speed; or tasks.

    perplexity = exp(mean negative log-likelihood) over windows that do not overlap, each window's first token unscored.
    """
    options.require_writable(json_file)
    increase = options.fraction(max_ppl_increase, "--max-ppl-increase")
    gated = increase is not None or max_kl is not None
    if baseline is None and gated:
        raise RecipeError("--max-ppl-increase and --max-kl compare with a baseline; name it with --baseline")
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
    if speed:
        if gated or tasks is not None:
            raise RecipeError("--speed measures no quality, so no gates and no --tasks go with it; run eval twice")
        if (kv_dtype, kv_policy, kv_budget) != (None, FULL, None):
            raise RecipeError(
                "--speed runs with the model's own KV cache, whole; "
                "leave --kv-dtype, --kv-policy and --kv-budget out, or --speed"
            )
        _speed(model, baseline, device, json_file, quiet=quiet)
        return
    if tasks is not None:
        if gated:
            raise RecipeError("--tasks measures neither perplexity nor KL, so these cannot gate it; run eval twice")
        from quantkit.cli.eval_tasks import evaluate_tasks

        models = {} if baseline is None else {"baseline": baseline}
        engine = EngineOptions(device, kv_dtype=kv_dtype or "auto", kv_policy=kv_policy, kv_budget=kv_budget)
        wanted = {"names": tasks.split(","), "limit": limit, "folder": task_dir, "num_fewshot": num_fewshot, "chat": chat}
        evaluate_tasks(models | {"model": model}, engine, wanted, json_file, quiet=quiet)
        return
    if (limit, task_dir, num_fewshot, chat) != (None, None, None, False):
        raise RecipeError(
            "--limit, --task-dir, --num-fewshot and --chat are about tasks of the harness; name some with --tasks"
        )
    budget = Budget(kv_policy, kv_budget)

    from quantkit.checkpoint.locate import locate
    from quantkit.cli import tables
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
    with tables.stage_bar(enabled=not quiet and sys.stderr.isatty()) as advance:
        report = run_evaluation(request, advance)
    options.console(json_file, quiet=quiet).print(tables.eval_table(report, model, baseline))
    if report.kernel_difference is not None and not abs(report.kernel_difference) <= KERNEL_TOLERANCE:
        typer.echo(
            f"warning: the packed kernels move the perplexity by {report.kernel_difference:+.1e} from that of the dequantized "
            f"weights, more than the {KERNEL_TOLERANCE:.0e} that rounding explains; generated text suffers alike",
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
    """Measure models one after another, each in a process of its own."""
    from quantkit.checkpoint.locate import locate
    from quantkit.cli import tables
    from quantkit.evaluation.speed import measure_apart
    from quantkit.utils.device import resolve_device

    names = [name for name in (baseline, model) if name is not None]
    reports = []
    for name in names:
        if not quiet and sys.stderr.isatty():
            typer.echo(f"measuring {name} (about a minute) ...", err=True)
        reports.append(measure_apart(locate(name), resolve_device(device)))
    options.console(json_file, quiet=quiet).print(tables.speed_table(reports))
    options.write_json(json_file, dict(zip(("baseline", "model")[-len(reports) :], map(asdict, reports), strict=True)))


def _failures(report: "EvalReport", max_increase: float | None, max_kl: float | None) -> list[str]:
    failures = []
    if max_increase is not None and report.ppl_increase is not None and not report.ppl_increase <= max_increase:
        failures.append(f"perplexity rose by {report.ppl_increase:.2%}, allowed is {max_increase:.2%}")
    kl = report.model.metrics.kl_mean
    if max_kl is not None and kl is not None and not kl <= max_kl:
        failures.append(f"mean KL divergence is {kl:.4f}, allowed is {max_kl:.4f}")
    return failures
