"""Quantize one block: load it, run the calibration rows through it, solve its matrices, and hand on its outputs."""

from collections.abc import Callable

from torch import Tensor

from quantkit.quantization.block import BlockQuantizer
from quantkit.quantization.calibration import ActivationStream, LockstepForward
from quantkit.quantization.distributed import SINGLE_PROCESS, ProcessGroup
from quantkit.quantization.fold_scales import QuantizedBlock
from quantkit.quantization.prepare import QuantizationJob
from quantkit.quantization.progress import Progress
from quantkit.quantization.report import MatrixReport


def quantize_block(
    job: QuantizationJob,
    index: int,
    streams: list[list[Tensor]],
    progress: Progress,
    on_output: Callable[[int, tuple[Tensor, ...]], None],
    *,
    keep_paused: bool = True,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[QuantizedBlock, list[MatrixReport]]:
    """Quantize block `index`. Returns what is to be written, and a report per matrix; writes nothing itself.

    Args:
        job: the run.
        index: number of the block.
        streams: for each version of the model (quantized, and original if the method needs it), the micro-batches [B, T, D]
            that enter the block. Empty for data-free rounding.
        progress: told about every matrix and micro-batch.
        on_output: called for each micro-batch, in order, with its number and the block's output [B, T, D] in every stream
            that has the micro-batch.
        keep_paused: see `LockstepForward`.
        process_group: the processes that share the work; all of them call this function.

    Raises:
        CheckpointError, NumericsError: the block's weights or its activations are damaged.
    """
    prefix = job.model.prefix(index)
    reports: list[MatrixReport] = []

    def on_report(report: MatrixReport) -> None:
        reports.append(report)
        progress.matrix(report)

    with job.model.block(index) as block:
        quantizer = BlockQuantizer(
            block,
            prefix,
            job.block_schemes(index),
            job.model.config,
            job.settings,
            on_report=on_report,
            on_stage=progress.stage,
            process_group=process_group,
            hessian_dtype=job.hessian_dtype,
        )
        names = job.checkpoint.names_under(prefix)
        unquantized = [name for name in names if job.schemes.get(name.removesuffix(".weight")) is None]
        quantizer.written.unquantized |= {name.removeprefix(prefix): t for name, t in job.read(unquantized).items()}
        groups = quantizer.groups_to_quantize(job.model.family.groups)
        if not streams:
            quantizer.quantize(groups, None, [])
            return quantizer.written, reports
        versions = [ActivationStream(micro_batches) for micro_batches in streams]
        kwargs = job.block_kwargs(index)
        with LockstepForward(
            block, groups, versions, kwargs, keep_paused=keep_paused, process_group=process_group
        ) as lockstep:
            quantizer.quantize(groups, lockstep, versions)
            for number, outputs in enumerate(lockstep.outputs()):
                on_output(number, outputs)
                progress.stage(f"{prefix[:-1]} outputs", number + 1, len(streams[0]))
        return quantizer.written, reports
