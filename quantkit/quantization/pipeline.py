"""The loop over blocks: quantize one, write it, go on from there after a kill.

One block is in memory at a time. A block's step ends with a line in the journal, so a killed run goes on after the last
finished block; equal recipe and source give equal bytes, interrupted or not, by one process or by several.

With several, all take every step together. The first writes; the others read the activations that it wrote, from the folder
that all of them see, and a step is finished for them when its journal entry reaches them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantkit.checkpoint.activations import Activations
from quantkit.checkpoint.files import Json, write_tensors
from quantkit.checkpoint.writer import Workspace
from quantkit.errors import ResourceError
from quantkit.formats import encode
from quantkit.quantization.block import BlockQuantizer
from quantkit.quantization.calibration import MICRO_BATCH_TOKENS, ActivationStream, LockstepForward
from quantkit.quantization.distributed import ProcessGroup
from quantkit.quantization.fold_scales import QuantizedBlock
from quantkit.quantization.lm_head import quantize_head
from quantkit.quantization.memory import MemoryPlan
from quantkit.quantization.prepare import QuantizationJob
from quantkit.quantization.report import MatrixReport
from quantkit.utils.resources import is_out_of_memory, keep_freed_memory, trim_memory


class Progress(Protocol):
    """What a run tells whoever watches."""

    def matrix(self, report: MatrixReport) -> None:
        """A matrix was quantized."""

    def block(self, done: int, total: int) -> None:
        """Blocks that are written, of all."""

    def note(self, text: str) -> None:
        """Something the user should know."""


@dataclass
class WorkerWorkspace:
    """What the processes other than the first have in place of the workspace.

    Attributes:
        folder, finished: the workspace's.
    """

    folder: Path
    finished: list[Json] = field(default_factory=list)


def quantize_blocks(
    job: QuantizationJob,
    workspace: Workspace | WorkerWorkspace,
    memory: MemoryPlan,
    progress: Progress,
    process_group: ProcessGroup,
) -> list[MatrixReport]:
    """Quantize every block into `workspace`, going on after its last finished one. Returns all matrices' reports.

    Args:
        job, memory, progress: see there.
        workspace: a follower in all processes but the first.
        team: who takes part.

    Raises:
        QuantkitError: the source is damaged, numbers overflow, or memory or disk ran out.
    """
    model = job.model
    with torch.no_grad():
        if not workspace.finished:
            _finish(workspace, process_group, lambda ours: _begin(job, ours, memory))
        for entry in workspace.finished[1:]:
            for report in entry["matrices"]:
                progress.matrix(MatrixReport(**report))
        _ = job.recorded_kwargs  # needs the embeddings
        model.release_non_block_weights()
        keep_freed_memory()
        for index in range(len(workspace.finished) - 1, model.block_count):
            progress.block(index, model.block_count)
            memory = _step_with_less_memory(job, workspace, memory, index, progress, process_group)
            trim_memory()
        if job.schemes["lm_head"] is not None and len(workspace.finished) == model.block_count + 1:
            _head_step(job, workspace, memory, progress, process_group)
        progress.block(model.block_count, model.block_count)
    return [MatrixReport(**report) for entry in workspace.finished for report in entry["matrices"]]


def _finish(workspace: Workspace | WorkerWorkspace, process_group: ProcessGroup, write: Callable[[Workspace], Json]) -> None:
    """End a step: the first process writes and commits the entry that `write` gives; the others come to know it."""
    if isinstance(workspace, Workspace):
        workspace.commit(write(workspace))
        process_group.broadcast_object(workspace.finished[-1])
    else:
        workspace.finished.append(process_group.broadcast_object({}))


def _begin(job: QuantizationJob, workspace: Workspace, memory: MemoryPlan) -> Json:
    """Step 0: everything outside the blocks, and the hidden states that enter the first one. Returns its journal entry."""
    if job.online:
        # Rotate again: the number of threads was not final before, and it may decide the last bits.
        job.model.load_non_block_weights()
    write_tensors(workspace.folder / "outside.safetensors", job.read(job.non_block_tensors))
    if job.tokens is not None:
        states = Activations.reserve(workspace.folder / _state(0), *_boundary(job), in_memory=memory.in_memory)
        streams = _batches(job, states)
        for index, rows in enumerate(job.token_batches()):
            hidden, _ = job.model.embed(rows)
            for stream in streams:
                if index < len(stream):
                    stream[index].copy_(hidden)
        states.save()
    return _entry(job, 0, "outside.safetensors", [])


def _entry(job: QuantizationJob, index: int, shard: str, reports: list[MatrixReport]) -> Json:
    """Says that the step before block `index` is finished."""
    state = {} if job.tokens is None else {"state": _state(index)}
    return {"shard": shard, "matrices": [asdict(report) for report in reports]} | state


def _state(index: int) -> str:
    """File name of the activations that enter block `index`."""
    return f"activations-{index:05}.bin"


def _boundary(job: QuantizationJob) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of a boundary's activations."""
    assert job.tokens is not None
    return (sum(job.stream_rows), job.tokens.shape[1], job.model.config.hidden_size), job.model.dtype


def _batches(job: QuantizationJob, states: Activations) -> list[list[Tensor]]:
    """Every stream's micro-batches, as views of the boundary's rows."""
    return [list(rows.split(job.rows_per_batch)) for rows in states.tensor.split(job.stream_rows)]


def _step_with_less_memory(
    job: QuantizationJob,
    workspace: Workspace | WorkerWorkspace,
    memory: MemoryPlan,
    index: int,
    progress: Progress,
    process_group: ProcessGroup,
) -> MemoryPlan:
    """One block; when memory runs out, again with less held. Returns what worked.

    A process with peers gives up at once: they are in the middle of the block.
    """
    while True:
        try:
            _step(job, workspace, memory, index, progress, process_group)
            return memory
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            less = memory.smaller()
            if process_group.size > 1 and less is not None:
                raise ResourceError(
                    f"{job.model.device} memory ran out in block {index}, in process {process_group.rank} of "
                    f"{process_group.size}; run the same command again with a smaller --max-memory "
                    "or fewer processes (finished blocks are kept)"
                ) from error
            if less is None:
                raise ResourceError(
                    f"{job.model.device} memory ran out in block {index}, even with micro-batches of {MICRO_BATCH_TOKENS} "
                    "tokens one at a time; free some or use another --device, and run the same command again (finished "
                    "blocks are kept), or lower --seq-len and pass --overwrite"
                ) from error
            memory = less
        progress.note(f"out of memory in block {index}: trying again with less held at a time")


def _step(
    job: QuantizationJob,
    workspace: Workspace | WorkerWorkspace,
    memory: MemoryPlan,
    index: int,
    progress: Progress,
    process_group: ProcessGroup,
) -> None:
    """Quantize, write and commit one block."""
    model, prefix = job.model, job.model.prefix(index)
    reports: list[MatrixReport] = []
    leads = isinstance(workspace, Workspace)

    def on_report(report: MatrixReport) -> None:
        reports.append(report)
        progress.matrix(report)

    def write(ours: Workspace) -> Json:
        shard = f"block-{index:05}.safetensors"
        write_tensors(ours.folder / shard, _encode(job, prefix, quantizer.written))
        return _entry(job, index + 1, shard, reports)

    with model.block(index) as block:
        quantizer = BlockQuantizer(
            block, prefix, job.block_schemes(index), model.config, job.settings, on_report, process_group=process_group
        )
        kept = [name for name in job.checkpoint.names_under(prefix) if job.schemes.get(name.removesuffix(".weight")) is None]
        quantizer.written.unquantized |= {name.removeprefix(prefix): t for name, t in job.read(kept).items()}
        groups = quantizer.groups_to_quantize(model.family.groups)
        if job.tokens is None:
            quantizer.run(groups, None, [])
        else:
            # In other processes a mapped file: they read their own rows of it only.
            states = Activations.load(workspace.folder / _state(index), *_boundary(job), in_memory=memory.in_memory and leads)
            streams = [ActivationStream(batches) for batches in _batches(job, states)]
            with LockstepForward(
                block, groups, streams, job.block_kwargs(index), keep_paused=memory.keep_paused, process_group=process_group
            ) as lockstep:
                quantizer.run(groups, lockstep, streams)
                following = states.following(workspace.folder / _state(index + 1)) if leads else None
                targets = _batches(job, following) if following else []
                for number, outputs in enumerate(lockstep.outputs()):
                    for target, output in zip(targets, outputs, strict=False):
                        target[number].copy_(output)
            if following:
                following.save()
        _finish(workspace, process_group, write)
    if leads:
        (workspace.folder / _state(index)).unlink(missing_ok=True)


def _head_step(
    job: QuantizationJob,
    workspace: Workspace | WorkerWorkspace,
    memory: MemoryPlan,
    progress: Progress,
    process_group: ProcessGroup,
) -> None:
    """Quantize, write and commit the output head."""
    job.model.load_non_block_weights()
    streams = []
    if job.tokens is not None:
        path = workspace.folder / _state(job.model.block_count)
        streams = _batches(
            job, Activations.load(path, *_boundary(job), in_memory=memory.in_memory and process_group.rank == 0)
        )
    weight, report = quantize_head(job, streams, process_group)
    progress.matrix(report)

    def write(ours: Workspace) -> Json:
        write_tensors(ours.folder / "head.safetensors", _encode(job, "", QuantizedBlock({"lm_head": weight}, {})))
        return {"shard": "head.safetensors", "matrices": [asdict(report)]}

    _finish(workspace, process_group, write)


def _encode(job: QuantizationJob, prefix: str, written: QuantizedBlock) -> dict[str, Tensor]:
    """The block's tensors under their final names.

    Raises:
        FormatError: the format cannot hold a matrix's scales.
    """
    tensors = {prefix + name: tensor for name, tensor in written.unquantized.items()}
    for name, weight in written.quantized.items():
        encoded = encode(job.recipe.format, weight, job.model.dtype, prefix + name)
        tensors |= {f"{prefix}{name}.{suffix}": tensor.cpu() for suffix, tensor in encoded.items()}
    return tensors
