"""Decide which calibration activations are kept in memory, and what to do if memory runs out."""

from dataclasses import dataclass, replace

import torch

from quantkit.quantization.distributed import ProcessGroup
from quantkit.quantization.prepare import QuantizationJob


@dataclass(frozen=True)
class MemoryPlan:
    """Where calibration activations are kept.

    Attributes:
        in_memory: hidden states between blocks are kept in RAM; otherwise in a memory-mapped file.
        hold: micro-batches pause inside a block; otherwise they run again for each group.
    """

    in_memory: bool
    keep_paused: bool

    def smaller(self) -> "MemoryPlan | None":
        """The next plan that needs less memory and gives the same result; None if there is none."""
        if self.keep_paused:
            return replace(self, keep_paused=False)
        return replace(self, in_memory=False) if self.in_memory else None


def plan_memory(job: QuantizationJob, limit: int, process_group: ProcessGroup) -> MemoryPlan:
    """The fastest plan that fits into `limit` bytes of host memory and, on a GPU, into half of its free memory."""
    if job.tokens is None:
        return MemoryPlan(in_memory=True, keep_paused=True)
    states, paused = job.activation_bytes()
    paused = -(-paused // process_group.size)
    if job.model.device.type == "cuda":
        return MemoryPlan(states <= limit, paused <= torch.cuda.mem_get_info(job.model.device)[0] // 2)
    return MemoryPlan(in_memory=states <= limit, keep_paused=states + paused <= limit)
