"""How much of the calibration activations is held in memory at a time, and when there was too little."""

from dataclasses import dataclass, replace

import torch

from quantkit.quantization.distributed import ProcessGroup
from quantkit.quantization.prepare import QuantizationJob


@dataclass(frozen=True)
class MemoryPlan:
    """How the calibration activations are kept.

    Attributes:
        in_memory: hidden states between blocks in RAM, otherwise in a memory-mapped file.
        hold: micro-batches pause inside a block, otherwise they run again for each group.
    """

    in_memory: bool
    keep_paused: bool

    def smaller(self) -> "MemoryPlan | None":
        """The next way that takes less memory and gives the same result; None when there is none."""
        if self.keep_paused:
            return replace(self, keep_paused=False)
        return replace(self, in_memory=False) if self.in_memory else None


def plan_memory(job: QuantizationJob, limit: int, process_group: ProcessGroup) -> MemoryPlan:
    """What fits into `limit` bytes of this process's memory (and, on a GPU, into half of what is free there)."""
    if job.tokens is None:
        return MemoryPlan(in_memory=True, keep_paused=True)
    states, paused = job.activation_bytes()
    paused = -(-paused // process_group.size)
    if job.model.device.type == "cuda":
        return MemoryPlan(states <= limit, paused <= torch.cuda.mem_get_info(job.model.device)[0] // 2)
    return MemoryPlan(in_memory=states <= limit, keep_paused=states + paused <= limit)
