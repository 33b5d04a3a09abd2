"""The loop over blocks: quantize a block, write it, and continue after it if the run is killed.

Only one block is in memory at a time. Each step (the tensors outside the blocks, every block, the head) ends with a line in
the journal, so a killed run continues after its last finished step. The same recipe and source give the same bytes, whether
or not the run was interrupted, and by any number of processes.

With several processes, all of them take every step together. The first one writes. The others read the activations that it
wrote, from a folder that all processes see; for them a step is finished when its journal entry reaches them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.activations import Activations
from quantkit.checkpoint.files import Json, write_tensors
from quantkit.checkpoint.writer import Workspace
from quantkit.errors import ResourceError
from quantkit.formats import encode
from quantkit.quantization.block_step import quantize_block
from quantkit.quantization.calibration import MICRO_BATCH_TOKENS
from quantkit.quantization.distributed import ProcessGroup
from quantkit.quantization.fold_scales import QuantizedBlock
from quantkit.quantization.lm_head import quantize_head
from quantkit.quantization.memory import MemoryPlan
from quantkit.quantization.prepare import QuantizationJob
from quantkit.quantization.progress import Progress
from quantkit.quantization.report import MatrixReport
from quantkit.utils.resources import is_out_of_memory, keep_freed_memory, trim_memory


@dataclass
class WorkerWorkspace:
    """What every process except the first has instead of a `Workspace`: it reads there and writes nothing.

    Attributes:
        folder, finished: as in `Workspace`.
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
    """Quantize every block, and the head if a rule names it, into `workspace`; continue after its last finished step.

    Args:
        job: the run.
        workspace: a `WorkerWorkspace` in every process except the first.
        memory: how activations are kept; less memory is used if this much turns out not to fit.
        progress: told what happens.
        process_group: the processes that share the work.

    Returns:
        The reports of all matrices, those of an interrupted run included.

    Raises:
        QuantkitError: the source is damaged, numbers overflow, or memory or disk space ran out.
    """
    return _Pipeline(job, workspace, memory, progress, process_group).run()


@dataclass
class _Pipeline:
    """The parts that every step needs; `memory` may shrink on the way."""

    job: QuantizationJob
    workspace: Workspace | WorkerWorkspace
    memory: MemoryPlan
    progress: Progress
    process_group: ProcessGroup

    @torch.no_grad()
    def run(self) -> list[MatrixReport]:
        """Take all steps that are left."""
        model, finished = self.job.model, self.workspace.finished
        if not finished:
            self._finish_step(self._write_first_step)
        for entry in finished[1:]:
            for report in entry["matrices"]:
                self.progress.matrix(MatrixReport(**report))
        _ = self.job.recorded_kwargs  # Recorded now, because it needs the embeddings.
        model.release_non_block_weights()
        keep_freed_memory()
        for index in range(len(finished) - 1, model.block_count):
            self.progress.block(index, model.block_count)
            self._block_step_within_memory(index)
            trim_memory()
        if self.job.schemes["lm_head"] is not None and len(finished) == model.block_count + 1:
            self._head_step()
        self.progress.block(model.block_count, model.block_count)
        return [MatrixReport(**report) for entry in finished for report in entry["matrices"]]

    @property
    def _leads(self) -> bool:
        """Whether this process is the one that writes."""
        return isinstance(self.workspace, Workspace)

    def _finish_step(self, write: Callable[[Workspace], Json]) -> None:
        """End a step: the first process commits the journal entry that `write` returns, and the others receive it."""
        if isinstance(self.workspace, Workspace):
            self.workspace.commit(write(self.workspace))
            self.process_group.broadcast_object(self.workspace.finished[-1])
        else:
            self.workspace.finished.append(self.process_group.broadcast_object({}))

    def _write_first_step(self, workspace: Workspace) -> Json:
        """Write all tensors outside the blocks, and the hidden states that enter the first block; return the entry."""
        job = self.job
        if job.online:
            # Rotate again: the number of threads was not final before, and it may decide the last bits.
            job.model.load_non_block_weights()
        write_tensors(workspace.folder / "outside.safetensors", job.read(job.non_block_tensors))
        if job.tokens is not None:
            shape, dtype = _boundary(job)
            states = Activations.reserve(workspace.folder / _state(0), shape, dtype, in_memory=self.memory.in_memory)
            streams = _micro_batches(job, states)
            for number, rows in enumerate(job.token_batches()):
                hidden, _ = job.model.embed(rows)
                for stream in streams:
                    if number < len(stream):
                        stream[number].copy_(hidden)
                self.progress.stage("embedding", number + 1, len(streams[0]))
            states.save()
        return _entry(job, 0, "outside.safetensors", [])

    def _block_step_within_memory(self, index: int) -> None:
        """Quantize, write and commit one block; if memory runs out, try again with a smaller memory plan.

        A process with peers fails at once, because they are in the middle of the block.

        Raises:
            ResourceError: memory ran out, and nothing is left to try.
        """
        while True:
            try:
                self._block_step(index)
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                smaller = self.memory.smaller()
                if smaller is None or self.process_group.size > 1:
                    raise ResourceError(self._out_of_memory(index, smaller)) from error
                self.memory = smaller
            self.progress.note(f"out of memory in block {index}: trying again with less held at a time")

    def _out_of_memory(self, index: int, smaller: MemoryPlan | None) -> str:
        """What to tell the user when memory ran out in a block for good."""
        device, group = self.job.model.device, self.process_group
        if smaller is not None:
            return (
                f"{device} memory ran out in block {index}, in process {group.rank} of {group.size}; run the same command "
                "again with a smaller --max-memory or fewer processes (finished blocks are kept)"
            )
        return (
            f"{device} memory ran out in block {index}, even with micro-batches of {MICRO_BATCH_TOKENS} tokens one at a time; "
            "free some or use another --device, and run the same command again (finished blocks are kept), or lower "
            "--seq-len and pass --overwrite"
        )

    def _block_step(self, index: int) -> None:
        """Quantize, write and commit one block."""
        job, folder = self.job, self.workspace.folder
        streams: list[list[Tensor]] = []
        targets: list[list[Tensor]] = []
        following: Activations | None = None
        if job.tokens is not None:
            states = self._load_states(index)
            streams = _micro_batches(job, states)
            if self._leads:
                following = states.following(folder / _state(index + 1))
                targets = _micro_batches(job, following)

        def keep(number: int, outputs: tuple[Tensor, ...]) -> None:
            for target, output in zip(targets, outputs, strict=False):
                target[number].copy_(output)

        def write(workspace: Workspace) -> Json:
            shard = f"block-{index:05}.safetensors"
            write_tensors(workspace.folder / shard, _encode(job, job.model.prefix(index), quantized))
            return _entry(job, index + 1, shard, reports)

        quantized, reports = quantize_block(
            job,
            index,
            streams,
            self.progress,
            keep,
            keep_paused=self.memory.keep_paused,
            process_group=self.process_group,
        )
        if following:
            following.save()
        self._finish_step(write)
        if self._leads:
            (folder / _state(index)).unlink(missing_ok=True)

    def _head_step(self) -> None:
        """Quantize, write and commit the output head."""
        job = self.job
        job.model.load_non_block_weights()
        streams: list[list[Tensor]] = []
        if job.tokens is not None:
            streams = _micro_batches(job, self._load_states(job.model.block_count))
        weight, report = quantize_head(job, streams, self.progress, self.process_group)

        def write(workspace: Workspace) -> Json:
            head = QuantizedBlock(quantized={"lm_head": weight}, unquantized={})
            write_tensors(workspace.folder / "head.safetensors", _encode(job, "", head))
            return {"shard": "head.safetensors", "matrices": [asdict(report)]}

        self._finish_step(write)

    def _load_states(self, index: int) -> Activations:
        """The hidden states that enter block `index`, or after the last block leave it.

        The other processes map the file, of which they read only their own rows.
        """
        shape, dtype = _boundary(self.job)
        in_memory = self.memory.in_memory and self._leads
        return Activations.load(self.workspace.folder / _state(index), shape, dtype, in_memory=in_memory)


def _entry(job: QuantizationJob, index: int, shard: str, reports: list[MatrixReport]) -> Json:
    """The journal entry of the step after which block `index` is next."""
    state = {} if job.tokens is None else {"state": _state(index)}
    return {"shard": shard, "matrices": [asdict(report) for report in reports]} | state


def _state(index: int) -> str:
    """File name of the activations that enter block `index`."""
    return f"activations-{index:05}.bin"


def _boundary(job: QuantizationJob) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape [rows of all streams, T, D] and dtype of the activations between two blocks."""
    assert job.tokens is not None
    return (sum(job.stream_rows), job.tokens.shape[1], job.model.config.hidden_size), job.model.dtype


def _micro_batches(job: QuantizationJob, states: Activations) -> list[list[Tensor]]:
    """The micro-batches of every stream, as views into the activations."""
    return [list(rows.split(job.rows_per_batch)) for rows in states.tensor.split(job.stream_rows)]


def _encode(job: QuantizationJob, prefix: str, block: QuantizedBlock) -> dict[str, Tensor]:
    """The tensors of a quantized block under the names that the artifact's format gives them.

    Raises:
        FormatError: the format cannot hold a matrix's scales.
    """
    tensors = {prefix + name: tensor for name, tensor in block.unquantized.items()}
    for name, weight in block.quantized.items():
        encoded = encode(job.recipe.format, weight, job.model.dtype, prefix + name)
        tensors |= {f"{prefix}{name}.{suffix}": tensor.cpu() for suffix, tensor in encoded.items()}
    return tensors
