"""Quantize the output head, for recipes with a rule that names `lm_head`."""

import time

import torch
from torch import Tensor

from quantkit.block_job import matrix_report
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.hessian import Hessian
from quantkit.methods.solve import prepare, solve
from quantkit.prepare import Prepared
from quantkit.report import MatrixReport

#: Rows of the head that are solved at once; rows are independent, and a vocabulary's worth would not fit.
_ROWS = 8192


def quantize_head(job: Prepared, streams: list[list[Tensor]]) -> tuple[QuantizedWeight, MatrixReport]:
    """Solve the head for the last block's outputs, micro-batches of every stream; none for data-free rounding."""
    scheme = job.plan["lm_head"]
    assert scheme is not None
    started = time.monotonic()
    moments = None
    if streams:
        sums = Hessian(job.model.config.hidden_size, job.model.device)
        for index in range(len(streams[0])):
            present = (stream[index].to(job.model.device) for stream in streams if index < len(stream))
            sums.add(*map(job.model.head_input, present))
        moments = prepare(sums.mean(), sums.drift(), job.settings)
    parts, targets = [], []
    for rows in job.model.head_weight.split(_ROWS):
        part, target = solve(rows.float(), moments, scheme, job.settings)
        parts.append(part)
        targets.append(target)
    whole = QuantizedWeight(
        torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), torch.cat([p.zeros for p in parts]), scheme
    )
    report = matrix_report("lm_head", whole, torch.cat(targets), moments, job.settings, None, "", time.monotonic() - started)
    return whole, report
