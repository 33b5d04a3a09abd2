"""The job: walk the blocks, quantize each matrix, write each block, report.

One block is in memory at a time. A block's step ends with a line in the journal, so a killed run goes on after the last
finished block; equal recipe and source give equal bytes, interrupted or not.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantkit.artifact import bits_per_weight, write_metadata
from quantkit.block_job import BlockJob
from quantkit.calibrate import MICRO_BATCH_TOKENS, Stream, Walk
from quantkit.checkpoint.activations import Activations
from quantkit.checkpoint.reader import Checkpoint, sha256
from quantkit.checkpoint.writer import Workspace, write_json, write_tensors
from quantkit.errors import QuantkitError, ResourceError
from quantkit.fold import Written
from quantkit.formats import FORMATS
from quantkit.prepare import Prepared, prepare_run
from quantkit.recipe import Recipe
from quantkit.report import MatrixReport, RunReport, Totals, worst_five
from quantkit.usage import cpu_seconds, peak_memory


class Progress(Protocol):
    """What a run tells whoever watches."""

    def matrix(self, report: MatrixReport) -> None:
        """A matrix was quantized."""

    def block(self, done: int, total: int) -> None:
        """Blocks that are written, of all."""

    def note(self, text: str) -> None:
        """Something the user should know."""


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
    """

    folder: Path
    out: Path
    recipe: Recipe
    device: torch.device
    max_memory: int
    overwrite: bool


@dataclass(frozen=True)
class Memory:
    """How the calibration activations are kept.

    Attributes:
        in_memory: hidden states between blocks in RAM, otherwise in a memory-mapped file.
        hold: micro-batches pause inside a block, otherwise they run again for each group.
    """

    in_memory: bool
    hold: bool


def quantize(job: Prepared, workspace: Workspace, memory: Memory, progress: Progress) -> list[MatrixReport]:
    """Quantize every block into `workspace`, going on after its last finished one. Returns all matrices' reports.

    Raises:
        QuantkitError: the source is damaged, numbers overflow, or memory or disk ran out.
    """
    model = job.model
    with torch.no_grad():
        if not workspace.finished:
            _begin(job, workspace, memory)
        for entry in workspace.finished[1:]:
            for report in entry["matrices"]:
                progress.matrix(MatrixReport(**report))
        for index in range(len(workspace.finished) - 1, model.count):
            progress.block(index, model.count)
            memory = _attempt(job, workspace, memory, index, progress)
        progress.block(model.count, model.count)
    return [MatrixReport(**report) for entry in workspace.finished for report in entry["matrices"]]


def _begin(job: Prepared, workspace: Workspace, memory: Memory) -> None:
    """Step 0: everything outside the blocks, and the hidden states that enter the first one."""
    write_tensors(workspace.folder / "outside.safetensors", job.checkpoint.read(job.outside))
    if job.tokens is not None:
        states = _boundary(job, workspace, memory, 0)
        streams = _batches(job, states)
        for index, rows in enumerate(job.token_batches()):
            hidden, _ = job.model.embed(rows)
            for stream in streams:
                if index < len(stream):
                    stream[index].copy_(hidden)
        states.save()
    workspace.commit({"shard": "outside.safetensors", "matrices": []})


def _boundary(job: Prepared, workspace: Workspace, memory: Memory, index: int) -> Activations:
    assert job.tokens is not None
    shape = (sum(job.stream_rows), job.tokens.shape[1], job.model.config.hidden_size)
    path = workspace.folder / f"activations-{index:05}.bin"
    return Activations(path, shape, job.model.dtype, in_memory=memory.in_memory)


def _batches(job: Prepared, states: Activations) -> list[list[Tensor]]:
    """Every stream's micro-batches, as views of the boundary's rows."""
    return [list(rows.split(job.rows_per_batch)) for rows in states.tensor.split(job.stream_rows)]


def _attempt(job: Prepared, workspace: Workspace, memory: Memory, index: int, progress: Progress) -> Memory:
    """One block; when memory runs out, once more with less held. Returns what worked."""
    while True:
        try:
            _step(job, workspace, memory, index, progress)
            return memory
        except (torch.OutOfMemoryError, MemoryError) as error:
            if not memory.hold:
                where = f"{job.model.device} memory ran out in block {index}"
                raise ResourceError(
                    f"{where} with one micro-batch of {MICRO_BATCH_TOKENS} tokens; lower --seq-len, use a device with more "
                    "memory or --device cpu, and run the same command again (finished blocks are kept)"
                ) from error
            progress.note(f"out of memory in block {index}: trying again with micro-batches one at a time")
            memory = Memory(memory.in_memory, hold=False)


def _step(job: Prepared, workspace: Workspace, memory: Memory, index: int, progress: Progress) -> None:
    """Quantize, write and commit one block."""
    model, prefix = job.model, job.model.prefix(index)
    reports: list[MatrixReport] = []

    def announce(report: MatrixReport) -> None:
        reports.append(report)
        progress.matrix(report)

    with model.block(index) as block:
        task = BlockJob(block, prefix, job.schemes_of(index), model.config, job.settings, announce)
        kept = [name for name in job.checkpoint.under(prefix) if job.plan.get(name.removesuffix(".weight")) is None]
        task.written.plain |= {name.removeprefix(prefix): t for name, t in job.checkpoint.read(kept).items()}
        groups = task.active(model.family.groups)
        if job.tokens is None:
            task.run(groups, None, [])
        else:
            states = _boundary(job, workspace, memory, index)
            streams = [Stream(batches) for batches in _batches(job, states)]
            kwargs = job.block_kwargs(index)
            with Walk(block, groups, streams, kwargs, hold=memory.hold) as walk:
                task.run(groups, walk, streams)
                following = states.following(workspace.folder / f"activations-{index + 1:05}.bin")
                targets = _batches(job, following)
                for number, outputs in enumerate(walk.outputs()):
                    for target, output in zip(targets, outputs, strict=False):
                        target[number].copy_(output)
            following.save()
        shard = f"block-{index:05}.safetensors"
        write_tensors(workspace.folder / shard, _encode(job, prefix, task.written))
    workspace.commit({"shard": shard, "matrices": [asdict(report) for report in reports]})
    (workspace.folder / f"activations-{index:05}.bin").unlink(missing_ok=True)


def _encode(job: Prepared, prefix: str, written: Written) -> dict[str, Tensor]:
    """The block's tensors under their final names."""
    form = FORMATS[job.recipe.format]
    tensors = {prefix + name: tensor for name, tensor in written.plain.items()}
    for name, weight in written.quantized.items():
        for suffix, tensor in form.encode(weight, job.model.dtype).items():
            tensors[f"{prefix}{name}.{suffix}"] = tensor.cpu()
    return tensors


def run(request: Request, progress: Progress) -> RunReport:
    """Quantize a model folder into an artifact at `request.out`, which appears complete or not at all.

    Raises:
        QuantkitError: anything the user can mend, in one line.
    """
    started, cpu = time.monotonic(), cpu_seconds()
    Workspace.require_free(request.out, overwrite=request.overwrite)
    job = prepare_run(request.folder, request.recipe, request.device)
    workspace = Workspace(request.out, job.identity(), overwrite=request.overwrite)
    resumed = max(len(workspace.finished) - 1, 0)
    if resumed:
        progress.note(f"going on after block {resumed} of {job.model.count} of an interrupted run")
    try:
        reports = quantize(job, workspace, memory_plan(job, request.max_memory), progress)
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
            versions=identity["versions"],
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
    except ResourceError:
        raise
    except QuantkitError:
        # A source or recipe that is wrong stays wrong: nothing half-written is left behind.
        workspace.discard()
        raise
    return report


def memory_plan(job: Prepared, limit: int) -> Memory:
    """What fits into `limit` bytes of host memory (and, on a GPU, into half of what is free there)."""
    if job.tokens is None:
        return Memory(in_memory=True, hold=True)
    states, paused = job.activation_bytes()
    if job.model.device.type == "cuda":
        return Memory(states <= limit, paused <= torch.cuda.mem_get_info(job.model.device)[0] // 2)
    return Memory(in_memory=states <= limit, hold=states + paused <= limit)
