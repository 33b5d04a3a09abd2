"""Copies of KV blocks in host memory: places and bytes, no names.

From a GPU the copies run beside the next forward, on a stream of their own and into pinned memory. On a CPU they are copies.
"""

from typing import Protocol

import torch
from torch import Tensor

from quantkit.errors import ResourceError
from quantkit.utils.resources import available_memory


class Blocks(Protocol):
    """What holds the blocks on the device.

    Attributes:
        block_bytes: size of one over all layers.
        nbytes: size of all.
        device: where they are.
    """

    block_bytes: int
    device: torch.device

    @property
    def nbytes(self) -> int:
        """See the class."""
        ...

    def export_block(self, block: int) -> Tensor:
        """All bytes of a block, uint8 [block_bytes], on the device."""
        ...

    def import_block(self, block: int, data: Tensor) -> None:
        """Set all bytes of a block from uint8 [block_bytes] on the device."""
        ...


class HostTier:
    """A fixed number of places for blocks."""

    def __init__(self, blocks: Blocks, places: int, beside: int = 0) -> None:
        """`beside`: bytes on the device that are taken for other blocks.

        Raises:
            ResourceError: there is not that much memory.
        """
        on_gpu = blocks.device.type == "cuda"
        # Caches on a CPU still count as free: nothing has been written to them yet.
        taken = 0 if on_gpu else blocks.nbytes + beside
        asked, free = places * blocks.block_bytes, max(0, available_memory() - taken)
        if asked > free:
            where = "" if on_gpu else " beside the KV cache"
            found = f"--kv-offload: there are {free / 2**30:.1f} GiB of free memory{where} and not {asked / 2**30:,.1f}"
            raise ResourceError(f"{found}; ask for less")
        self._blocks = blocks
        self._memory = torch.empty(places, blocks.block_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(blocks.device) if on_gpu else None
        #: Of the last copy into a place.
        self._written: dict[int, torch.cuda.Event] = {}

    def put(self, place: int, block: int) -> None:
        """Copy a block into a place. The block may be overwritten at once by whatever runs later on the device."""
        data = self._blocks.export_block(block)
        if self._stream is None:
            self._memory[place] = data
            return
        # Also behind earlier copies out of the same place, which run on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(data.device))
        with torch.cuda.stream(self._stream):
            self._memory[place].copy_(data, non_blocking=True)
        data.record_stream(self._stream)
        self._written[place] = self._stream.record_event()

    def get(self, place: int, block: int) -> None:
        """Copy a place into a block, before whatever runs later on the device."""
        if self._stream is not None:
            torch.cuda.current_stream(self._blocks.device).wait_event(self._written[place])
        self.send(self._memory[place], block)

    def send(self, data: Tensor, block: int) -> None:
        """Copy bytes on the host, uint8 [block_bytes], into a block."""
        self._blocks.import_block(block, data.to(self._blocks.device, non_blocking=True))

    def read(self, place: int) -> Tensor:
        """The bytes in a place, uint8 [block_bytes], once they have arrived."""
        if self._stream is not None:
            self._written[place].synchronize()
        return self._memory[place]
