"""How much of the calibration activations is held in memory at a time, and when there was too little."""

from dataclasses import dataclass, replace

import torch

from quantkit.quantization.distributed import Team
from quantkit.quantization.prepare import Prepared


@dataclass(frozen=True)
class Memory:
    """How the calibration activations are kept.

    Attributes:
        in_memory: hidden states between blocks in RAM, otherwise in a memory-mapped file.
        hold: micro-batches pause inside a block, otherwise they run again for each group.
    """

    in_memory: bool
    hold: bool

    def less(self) -> "Memory | None":
        """The next way that takes less memory and gives the same result; None when there is none."""
        if self.hold:
            return replace(self, hold=False)
        return replace(self, in_memory=False) if self.in_memory else None


def memory_plan(job: Prepared, limit: int, team: Team) -> Memory:
    """What fits into `limit` bytes of this process's memory (and, on a GPU, into half of what is free there)."""
    if job.tokens is None:
        return Memory(in_memory=True, hold=True)
    states, paused = job.activation_bytes()
    paused = -(-paused // team.size)
    if job.model.device.type == "cuda":
        return Memory(states <= limit, paused <= torch.cuda.mem_get_info(job.model.device)[0] // 2)
    return Memory(in_memory=states <= limit, hold=states + paused <= limit)
