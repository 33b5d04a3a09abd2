"""`quantkit eval --tasks`: tasks of the lm-evaluation-harness on a model and, if there is one, on its baseline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from quantkit.cli import options, tables
from quantkit.cli.engine_options import EngineOptions
from quantkit.cli.progress import Progress
from quantkit.errors import QuantkitError, install_command

if TYPE_CHECKING:
    from quantkit.evaluation.tasks import Score, TaskReport


def evaluate_tasks(
    models: Mapping[str, str], engine: EngineOptions, wanted: Mapping[str, Any], json_file: Path | None, *, quiet: bool
) -> None:
    """Run tasks on one model after another, and show a table or write JSON.

    Args:
        models: "baseline" (if there is one) and "model" -> the name that the user gave.
        engine: how the models are run.
        wanted: fields of a `TaskRequest`.
        json_file, quiet: the options of these names.
    """
    try:
        from quantkit.evaluation.tasks import TaskRequest, run_tasks
    except ModuleNotFoundError as error:
        raise QuantkitError(f"quantkit eval --tasks needs {error.name}; run: {install_command('lm-eval')}") from None
    request, reports = TaskRequest(**wanted), {}
    for role, name in models.items():
        with Progress(quiet=quiet, stage=f"loading {name}") as progress:
            session = engine.open(name)
            reports[role] = run_tasks(session, name, request, progress.advance)
        del session  # frees its memory for the next one
    options.console(json_file, quiet=quiet).print(_table(list(reports.values())))
    options.write_json(json_file, {role: report.to_json() for role, report in reports.items()})


def _table(reports: "Sequence[TaskReport]") -> Table:
    """One row per number, one column per model; with two models, one for the change."""
    changes = ["change"] if len(reports) > 1 else []
    table = tables.named("task", "metric", "documents", "few-shot", *(report.name for report in reports), *changes)
    for scores in zip(*(report.scores for report in reports), strict=True):
        first = scores[0]
        change = [f"{scores[-1].value - first.value:+.4f}"] if changes else []
        documents, shots = ("" if count is None else str(count) for count in (first.documents, first.num_fewshot))
        table.add_row(first.task, first.metric + _arrow(first), documents, shots, *map(_value, scores), *change)
    cut = [
        f"{report.name}: {report.truncated} texts were longer than the context and were cut"
        for report in reports
        if report.truncated
    ]
    table.caption = "\n".join(["value ± standard error", *cut])
    return table


def _value(score: "Score") -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _arrow(score: "Score") -> str:
    """Which way is better."""
    return {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
