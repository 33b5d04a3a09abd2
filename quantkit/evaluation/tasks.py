"""`quantkit eval --tasks`: run tasks of the lm-evaluation-harness and report their scores.

The harness's own messages and progress bars are hidden; the report has the relevant content.
"""

import io
import random
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from quantkit.errors import CorpusError
from quantkit.evaluation.harness import EngineLM
from quantkit.runtime.session import Session

#: The harness's default seeds, so that the few-shot examples are the usual ones.
_SEED, _OTHER_SEED = 0, 1234


@dataclass(frozen=True)
class TaskRequest:
    """What to run.

    Attributes:
        names: names of tasks, groups or tags; wildcards are allowed.
        limit: use only the first `limit` documents of each task; None: all.
        folder: a folder with additional tasks; None: only the harness's own.
        num_fewshot: examples per prompt; None: the task's default.
        chat: put prompts into the model's chat template.
    """

    names: Sequence[str]
    limit: int | None = None
    folder: Path | None = None
    num_fewshot: int | None = None
    chat: bool = False


@dataclass(frozen=True)
class Score:
    """One number of one task or group.

    Attributes:
        task: its name.
        metric: the metric, followed by a comma and the filter if there is one, as in "exact_match,strict-match".
        value: the score.
        stderr: standard error of the mean over documents; None where the harness gives none.
        documents: number of evaluated documents; None for a group.
        higher_is_better: None where the task does not say.
        num_fewshot: examples per prompt.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int | None
    higher_is_better: bool | None
    num_fewshot: int | None


@dataclass(frozen=True)
class TaskReport:
    """A model's scores, and how many texts were truncated at the front to fit the context."""

    name: str
    scores: list[Score]
    truncated: int

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self)


def run_tasks(session: Session, name: str, request: TaskRequest, advance: Callable[[str, int, int], None]) -> TaskReport:
    """Run tasks on a model.

    Args:
        session: the model; see `EngineLM`.
        name: the model's name in the report.
        request: what to run.
        advance: called with (kind of request, finished requests, requests).

    Raises:
        CorpusError: a task is unknown, or its files or data set cannot be read.
        RequestError: a task asks for something that the engine does not support.
    """
    model = EngineLM(session, advance)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        tasks = _load(request)
        random.seed(_SEED)
        np.random.seed(_OTHER_SEED)
        torch.manual_seed(_OTHER_SEED)
        results = evaluator.evaluate(
            model,
            tasks,
            limit=request.limit,
            log_samples=False,
            apply_chat_template=request.chat,
            fewshot_as_multiturn=request.chat,
        )
    return TaskReport(name, _scores(results), model.truncated)


def _load(request: TaskRequest) -> Any:
    """Load the tasks. The harness's own tasks are searched only if the folder does not have all that are named."""
    named = f"--tasks {','.join(request.names)}"
    if request.folder is not None and not request.folder.is_dir():
        raise CorpusError(f"--task-dir {request.folder}: no such folder; name one that holds tasks as YAML")
    try:
        manager = TaskManager(include_path=None if request.folder is None else str(request.folder), include_defaults=False)
        if request.folder is None or _unknown(manager, request.names):
            manager = TaskManager(include_path=None if request.folder is None else str(request.folder))
        if unknown := _unknown(manager, request.names):
            raise CorpusError(f"{named}: the harness has no task {unknown[0]!r}; name another, or its folder with --task-dir")
        loaded = manager.load(manager.match_tasks(list(request.names)))
    except CorpusError:
        raise
    except Exception as error:  # Task files come from anyone: yaml, jinja, datasets and the Hub client raise many types.
        reason = " ".join(str(error).split())[:200]
        why = f"{type(error).__name__}: {reason}"
        raise CorpusError(f"{named}: cannot be loaded ({why}); check its files and the network") from error
    for task in loaded["tasks"].values():
        # An explicit 0 in a task is not overridden.
        if task.get_config("num_fewshot") is None or (request.num_fewshot is not None and task.get_config("num_fewshot")):
            task.set_config("num_fewshot", request.num_fewshot or 0)
        task.set_fewshot_seed(_OTHER_SEED)
    return loaded


def _unknown(manager: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if not manager.match_tasks([name])]


def _scores(results: Any) -> list[Score]:
    """The harness's results as a list of scores, groups after tasks."""
    found = []
    for task, entries in (results["results"] | results.get("groups", {})).items():
        for metric, value in entries.items():
            name, _, chosen = metric.partition(",")
            if not chosen or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = entries.get(f"{name}_stderr,{chosen}")
            found.append(
                Score(
                    task=task,
                    metric=name if chosen == "none" else metric,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    documents=results["n-samples"].get(task, {}).get("effective"),
                    higher_is_better=results["higher_is_better"].get(task, {}).get(name),
                    num_fewshot=results["n-shot"].get(task),
                )
            )
    return found
