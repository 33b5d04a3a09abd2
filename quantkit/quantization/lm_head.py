"""Quantize the output head, if a rule of the recipe names `lm_head`."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.methods.base import InputStats
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.solve import solve
from quantkit.quantization.block import accumulate_hessian, matrix_report
from quantkit.quantization.distributed import ProcessGroup
from quantkit.quantization.prepare import QuantizationJob
from quantkit.quantization.progress import Progress
from quantkit.quantization.report import MatrixReport

#: Rows of the head that are solved at once. Rows are independent of one another, and all of them at once would need too much
#: memory.
_ROWS = 8192


def quantize_head(
    job: QuantizationJob, streams: list[list[Tensor]], progress: Progress, process_group: ProcessGroup
) -> tuple[QuantizedWeight, MatrixReport]:
    """Solve the output head for the inputs that it gets from the last block.

    Every process reads all inputs, sums its share of the columns and solves its share of the rows.

    Args:
        job: the run; the model's head is loaded.
        streams: for each version of the model, the micro-batches [B, T, D] that leave the last block. Empty for data-free
            rounding.
        progress: told about every micro-batch and piece.
        process_group: the processes that share the work.
    """
    scheme = job.schemes["lm_head"]
    assert scheme is not None
    started = time.monotonic()
    stats = None
    if streams:
        sums = accumulate_hessian(
            *(_inputs(job, streams, progress), job.model.config.hidden_size, job.model.device),
            process_group,
            job.hessian_dtype,
        )
        stats = InputStats(sums.mean(), sums.drift(), job.settings)
    pieces = job.model.head_weight.split(_ROWS)
    owners = process_group.assign_owners([len(rows) for rows in pieces])
    widened = (rows.float() for rows in pieces)
    targets = list(widened) if stats is None else stats.take_targets(widened)
    parts = []
    for target, owner in zip(targets, owners, strict=True):
        own = owner == process_group.rank
        parts.append(
            solve(target, stats, scheme, job.settings) if own else QuantizedWeight.empty(target.shape, scheme, target.device)
        )
        progress.stage("lm_head rows", len(parts), len(targets))
    for part, owner in zip(parts, owners, strict=True):
        for tensor in (part.codes, part.scales, part.zeros):
            process_group.broadcast(tensor, owner)
    whole = QuantizedWeight(
        torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), torch.cat([p.zeros for p in parts]), scheme
    )
    report = matrix_report("lm_head", whole, torch.cat(targets), stats, job.settings, None, "", time.monotonic() - started)
    return whole, report


def _inputs(job: QuantizationJob, streams: list[list[Tensor]], progress: Progress) -> Iterator[tuple[Tensor, ...]]:
    """Per micro-batch, what the head reads, [B, T, D], in every stream that has the micro-batch."""
    total = len(streams[0])
    for index in range(total):
        yield tuple(job.model.head_input(stream[index].to(job.model.device)) for stream in streams if index < len(stream))
        progress.stage("lm_head calibration", index + 1, total)
