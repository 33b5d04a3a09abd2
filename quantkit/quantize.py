"""The job: check everything, walk the blocks, publish the artifact with its report."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from quantkit.artifact import bits_per_weight, write_metadata
from quantkit.block_loop import Progress, memory_plan, quantize_blocks
from quantkit.checkpoint.files import write_json
from quantkit.checkpoint.reader import Checkpoint, read_json, sha256
from quantkit.checkpoint.writer import Workspace
from quantkit.errors import ArtifactError, CheckpointError, QuantkitError, ResourceError
from quantkit.prepare import Prepared, prepare_run
from quantkit.recipe import Recipe
from quantkit.report import MatrixReport, RunReport, Totals, worst_five
from quantkit.usage import cpu_seconds, peak_memory


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        folder: the source model.
        out: where the artifact will appear.
        recipe: may hold "auto".
        device: where blocks are computed.
        max_memory: host bytes for calibration activations.
        overwrite: replace OUT, or an unfinished run that differs.
        threads: to compute with; None: as many as torch chose. An interrupted run goes on with its own number.
    """

    folder: Path
    out: Path
    recipe: Recipe
    device: torch.device
    max_memory: int
    overwrite: bool
    threads: int | None = None


def run(request: Request, progress: Progress) -> RunReport:
    """Quantize a model folder into an artifact at `request.out`, which appears complete or not at all.

    Raises:
        QuantkitError: anything the user can mend, in one line.
    """
    started, cpu = time.monotonic(), cpu_seconds()
    left_over = request.out.is_dir() and Workspace.folder_of(request.out).is_dir()
    if not left_over:
        require_free(request)
    job = prepare_run(request.folder, request.recipe, request.device)
    if left_over:
        complete = _complete(request.out, job)
        if complete is not None:
            Workspace.delete_leftovers(request.out)
            progress.note(f"{request.out} was complete already; deleted what a killed run had left beside it")
            return complete
        require_free(request)
    settings = {"threads": request.threads or torch.get_num_threads()}
    with Workspace(request.out, job.identity(), overwrite=request.overwrite, settings=settings) as workspace:
        threads: int = workspace.settings["threads"]
        if threads != torch.get_num_threads():
            # The order of sums, and so the last bits of the result, depend on it.
            progress.note(f"computing with {threads} threads, as the run did that this one goes on with or repeats")
            torch.set_num_threads(threads)
        try:
            return _make(request, job, workspace, progress, started, cpu)
        except (ResourceError, ArtifactError):
            raise
        except QuantkitError:
            # A source or recipe that is wrong stays wrong: nothing half-written is left behind.
            workspace.discard()
            raise


def _make(request: Request, job: Prepared, workspace: Workspace, progress: Progress, started: float, cpu: float) -> RunReport:
    """From an open workspace to the published artifact."""
    resumed = min(max(len(workspace.finished) - 1, 0), job.model.count)
    if resumed:
        progress.note(f"going on after block {resumed} of {job.model.count} of an interrupted run")
    reports = quantize_blocks(job, workspace, memory_plan(job, request.max_memory), progress)
    folder, shards = workspace.join()
    write_metadata(job.checkpoint, folder, job.recipe.format, job.plan)
    written = Checkpoint(folder)
    totals = Totals(
        matrices=len(reports),
        bits_per_weight=bits_per_weight(written),
        size_bytes=sum(path.stat().st_size for path in shards),
        source_bytes=sum(path.stat().st_size for path in job.checkpoint.files),
        output_error=sum(report.output_error for report in reports) / len(reports),
        cpu_seconds=cpu_seconds() - cpu,
        wall_seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory(),
        resumed_blocks=resumed,
    )
    identity = job.identity()
    report = RunReport(
        recipe=identity["recipe"],
        versions=identity["versions"] | {"threads": str(torch.get_num_threads())},
        source={"folder": str(request.folder), "sha256": identity["source"]},
        calibration_tokens_sha256=identity["calibration tokens"],
        output_sha256={path.name: sha256(path) for path in shards},
        unquantized=job.unquantized(),
        engines=[asdict(engine) for engine in job.engines()],
        totals=totals,
        worst=worst_five(reports),
        matrices=reports,
    )
    write_json(folder / "quantkit.json", report.to_json())
    workspace.publish()
    return report


def require_free(request: Request) -> None:
    """Refuse an OUT that is in the way, or that is the source.

    Raises:
        ArtifactError: it is.
    """
    Workspace.require_free(request.out, overwrite=request.overwrite)
    if request.out.exists() and request.out.samefile(request.folder):
        raise ArtifactError(f"{request.out}: is the source model, which --overwrite does not replace; choose another OUT")


def _complete(out: Path, job: Prepared) -> RunReport | None:
    """The report of a finished artifact at `out` if it is what `job` would make, to the last byte."""
    identity = job.identity()
    try:
        stored = read_json(out / "quantkit.json")
        made = {
            "recipe": stored["recipe"],
            "source": stored["source"]["sha256"],
            "calibration tokens": stored["calibration_tokens_sha256"],
            "versions": {name: stored["versions"][name] for name in identity["versions"]},
        }
        whole = all(sha256(out / name) == digest for name, digest in stored["output_sha256"].items())
        if not whole or made != {key: identity[key] for key in made}:
            return None
        matrices = [MatrixReport(**matrix) for matrix in stored["matrices"]]
        return RunReport(**stored | {"totals": Totals(**stored["totals"]), "matrices": matrices})
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None
