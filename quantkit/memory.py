"""How much of the calibration activations is held in memory at a time, and when there was too little."""

from dataclasses import dataclass, replace

import torch

from quantkit.prepare import Prepared
from quantkit.ranks import Team


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out; torch's CPU allocator says so only in words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("can't allocate memory", "ALLOC_FAILED"))


def memory_plan(job: Prepared, limit: int, team: Team) -> Memory:
    """What fits into `limit` bytes of this process's memory (and, on a GPU, into half of what is free there)."""
    if job.tokens is None:
        return Memory(in_memory=True, hold=True)
    states, paused = job.activation_bytes()
    paused = -(-paused // team.size)
    if job.model.device.type == "cuda":
        return Memory(states <= limit, paused <= torch.cuda.mem_get_info(job.model.device)[0] // 2)
    return Memory(in_memory=states <= limit, hold=states + paused <= limit)
