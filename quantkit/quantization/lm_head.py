"""Quantize the output head, for recipes with a rule that names `lm_head`."""

import time

import torch
from torch import Tensor

from quantkit.methods.base import InputStats
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.solve import solve
from quantkit.quantization.block import accumulate_hessian, matrix_report
from quantkit.quantization.distributed import ProcessGroup
from quantkit.quantization.prepare import QuantizationJob
from quantkit.quantization.report import MatrixReport

#: Rows of the head that are solved at once; rows are independent, and a vocabulary's worth would not fit.
_ROWS = 8192


def quantize_head(
    job: QuantizationJob, streams: list[list[Tensor]], process_group: ProcessGroup
) -> tuple[QuantizedWeight, MatrixReport]:
    """Solve the head for the last block's outputs, micro-batches of every stream; none for data-free rounding.

    Every process of the team reads all outputs, sums its columns and solves its pieces.
    """
    scheme = job.schemes["lm_head"]
    assert scheme is not None
    started = time.monotonic()
    stats = None
    if streams:
        inputs = (
            tuple(job.model.head_input(stream[index].to(job.model.device)) for stream in streams if index < len(stream))
            for index in range(len(streams[0]))
        )
        sums = accumulate_hessian(inputs, job.model.config.hidden_size, job.model.device, process_group)
        stats = InputStats(sums.mean(), sums.drift(), job.settings)
    pieces = job.model.head_weight.split(_ROWS)
    owners = process_group.assign_owners([len(rows) for rows in pieces])
    widened = (rows.float() for rows in pieces)
    targets = list(widened) if stats is None else stats.take_targets(widened)
    parts = [
        solve(target, stats, scheme, job.settings)
        if owner == process_group.rank
        else QuantizedWeight.empty(target.shape, scheme, target.device)
        for target, owner in zip(targets, owners, strict=True)
    ]
    for part, owner in zip(parts, owners, strict=True):
        for tensor in (part.codes, part.scales, part.zeros):
            process_group.broadcast(tensor, owner)
    whole = QuantizedWeight(
        torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), torch.cat([p.zeros for p in parts]), scheme
    )
    report = matrix_report("lm_head", whole, torch.cat(targets), stats, job.settings, None, "", time.monotonic() - started)
    return whole, report
