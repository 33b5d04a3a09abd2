"""Quantize a model: check everything, quantize block by block, and publish the artifact with its report."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.files import write_json
from quantkit.checkpoint.reader import Checkpoint, read_json, sha256
from quantkit.checkpoint.writer import Workspace
from quantkit.errors import CheckpointError
from quantkit.formats.artifact import bits_per_weight, write_metadata
from quantkit.formats.model_card import write_model_card
from quantkit.methods.products import fastest_products
from quantkit.models.matmul_dtype import fastest_matmul
from quantkit.quantization.distributed import SINGLE_PROCESS, ProcessGroup
from quantkit.quantization.memory import plan_memory
from quantkit.quantization.pipeline import WorkerWorkspace, quantize_blocks
from quantkit.quantization.prepare import QuantizationJob, prepare_job
from quantkit.quantization.progress import Progress
from quantkit.quantization.report import MatrixReport, RunReport, Totals, worst_five
from quantkit.recipe import Recipe
from quantkit.utils.renamed_keys import with_current_keys
from quantkit.utils.resources import cpu_seconds, peak_memory


@dataclass(frozen=True)
class QuantizeRequest:
    """What the user asked for.

    Attributes:
        folder: the source model.
        out: the artifact's folder.
        recipe: the recipe; it may contain "auto".
        device: where blocks are computed.
        max_memory: bytes of host memory for calibration activations.
        overwrite: replace OUT, or an unfinished run with other settings.
        compute_settings: "threads", "matmul" and "hessian" (the dtypes in which the model's matrices and the Hessians are
            multiplied) of a recorded run that is repeated, because they decide the last bits. Missing ones are chosen for
            this machine. An interrupted run continues with the settings it began with.
    """

    folder: Path
    out: Path
    recipe: Recipe
    device: torch.device
    max_memory: int
    overwrite: bool
    compute_settings: Mapping[str, Any] = field(default_factory=dict)


def quantize_model(request: QuantizeRequest, progress: Progress, process_group: ProcessGroup = SINGLE_PROCESS) -> RunReport:
    """Quantize a model folder into an artifact at `request.out`, which appears complete or not at all.

    With several processes, the first one calls this and the others call `join_as_worker`.

    Raises:
        QuantkitError: anything that the user can correct, in one line.
    """
    started, cpu = time.monotonic(), cpu_seconds()
    left_over = request.out.is_dir() and Workspace.folder_of(request.out).is_dir()
    if not left_over:
        Workspace.require_free(request.out, request.folder, overwrite=request.overwrite)
    job = prepare_job(request.folder, request.recipe, request.device)
    if left_over:
        complete = _report_of_finished(request.out, job)
        if complete is not None:
            Workspace.delete_leftovers(request.out)
            process_group.broadcast_object(None)
            progress.note(f"{request.out} was already complete; deleted what a killed run had left next to it")
            return complete
    best = _fastest_compute_settings(job)
    settings = best | dict(request.compute_settings)
    with Workspace(
        request.out,
        job.identity(),
        source=request.folder,
        overwrite=request.overwrite,
        settings=settings,
        upgrade=_upgraded,
    ) as workspace:
        settings = workspace.settings = {"hessian": "float32"} | workspace.settings  # Older versions knew no other.
        if settings != best:
            how = f"{settings['threads']} threads, products in {settings['matmul']}, Hessians in {settings['hessian']}"
            progress.note(f"computing with {how}, like the run that is continued or repeated")
        process_group.broadcast_object((settings, workspace.finished))
        _apply_compute_settings(job, settings)
        return _quantize_and_publish(request, job, workspace, progress, process_group, started, cpu)


def join_as_worker(request: QuantizeRequest, progress: Progress, process_group: ProcessGroup) -> None:
    """Do this process's share of the run that the first process leads. Writes nothing.

    Raises:
        QuantkitError: as `quantize_model`.
    """
    job = prepare_job(request.folder, request.recipe, request.device)
    started: tuple[dict[str, Any], list[dict[str, Any]]] | None = process_group.broadcast_object(None)
    if started is not None:
        settings, finished = started
        _apply_compute_settings(job, settings)
        seen = WorkerWorkspace(Workspace.folder_of(request.out), finished)
        quantize_blocks(job, seen, plan_memory(job, request.max_memory, process_group), progress, process_group)


def _upgraded(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity of an unfinished run with the current keys of the recipe, whichever version of quantkit started it."""
    try:
        return identity | {"recipe": with_current_keys(identity["recipe"])}
    except (KeyError, TypeError, ValueError):
        return identity  # Damaged: it will differ from every run's.


def _fastest_compute_settings(job: QuantizationJob) -> dict[str, Any]:
    """The settings with which this machine is fastest, among those that decide the last bits."""
    dtype, device = job.model.dtype, job.model.device
    hessian = torch.float32 if job.tokens is None else fastest_products(dtype, device)
    chosen = {"matmul": fastest_matmul(dtype, device), "hessian": hessian}
    names = {key: str(value).removeprefix("torch.") for key, value in chosen.items()}
    return {"threads": torch.get_num_threads()} | names


def _apply_compute_settings(job: QuantizationJob, settings: Mapping[str, Any]) -> None:
    """Apply the settings that decide the last bits."""
    torch.set_num_threads(settings["threads"])
    job.model.matmul_dtype = getattr(torch, settings["matmul"])
    # A recorded run of a bfloat16 model may be repeated with a model of another dtype.
    job.hessian_dtype = getattr(torch, settings["hessian"]) if job.model.dtype == torch.bfloat16 else torch.float32


def _quantize_and_publish(
    request: QuantizeRequest,
    job: QuantizationJob,
    workspace: Workspace,
    progress: Progress,
    process_group: ProcessGroup,
    started: float,
    cpu: float,
) -> RunReport:
    """Quantize into an open workspace and publish the artifact."""
    resumed = min(max(len(workspace.finished) - 1, 0), job.model.block_count)
    if resumed:
        progress.note(f"continuing an interrupted run after block {resumed} of {job.model.block_count}")
    reports = quantize_blocks(job, workspace, plan_memory(job, request.max_memory, process_group), progress, process_group)
    folder, shards = workspace.merge_shards()
    write_metadata(job.checkpoint, folder, job.recipe.format, job.schemes, job.online)
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
        processes=process_group.size,
    )
    identity = job.identity()
    report = RunReport(
        recipe=identity["recipe"],
        versions=identity["versions"] | {name: str(value) for name, value in workspace.settings.items()},
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
    write_model_card(folder, job.checkpoint)
    workspace.publish()
    return report


def _report_of_finished(out: Path, job: QuantizationJob) -> RunReport | None:
    """The report of the artifact at `out` if it is complete and what `job` would make, byte for byte; else None."""
    identity = job.identity()
    try:
        stored = read_json(out / "quantkit.json")
        stored["recipe"] = with_current_keys(stored["recipe"])
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
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return None
