"""Copies of KV blocks in host memory. This tier knows numbered places and bytes; `offload` knows which block is where.

From a GPU, copies run in parallel to the next forward: on a stream of their own, into pinned memory. On a CPU they are plain
copies.
"""

from typing import Protocol

import torch
from torch import Tensor

from quantkit.errors import ResourceError
from quantkit.utils.resources import available_memory


class Blocks(Protocol):
    """The blocks on the device; `KVCache` is one implementation.

    Attributes:
        block_bytes: bytes per block over all layers.
        nbytes: bytes of all blocks.
        device: where they are.
    """

    block_bytes: int
    device: torch.device

    @property
    def nbytes(self) -> int:
        """See the class."""
        ...

    def export_block(self, block: int) -> Tensor:
        """A copy of all bytes of a block, uint8 [block_bytes], on the device."""
        ...

    def import_block(self, block: int, data: Tensor) -> None:
        """Set all bytes of a block from uint8 [block_bytes] on the device."""
        ...


class HostTier:
    """A fixed number of places for blocks."""

    def __init__(self, blocks: Blocks, places: int, other_bytes: int = 0) -> None:
        """
        Args:
            blocks: the blocks on the device.
            places: how many blocks fit.
            other_bytes: bytes on the device that are allocated for other caches.

        Raises:
            ResourceError: there is not that much host memory.
        """
        on_gpu = blocks.device.type == "cuda"
        # The memory of caches on a CPU still counts as free, because nothing has been written to it yet.
        taken = 0 if on_gpu else blocks.nbytes + other_bytes
        asked, free = places * blocks.block_bytes, max(0, available_memory() - taken)
        if asked > free:
            left = "" if on_gpu else " after the KV cache is allocated"
            found = f"--kv-offload: {asked / 2**30:,.1f} GiB are asked for and {free / 2**30:.1f} GiB are free{left}"
            raise ResourceError(f"{found}; ask for less")
        self._blocks = blocks
        self._memory = torch.empty(places, blocks.block_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(blocks.device) if on_gpu else None
        #: Place -> when the last copy into it is complete.
        self._written: dict[int, torch.cuda.Event] = {}

    def put(self, place: int, block: int) -> None:
        """Copy a block into a place. Work that is queued on the device from now on may overwrite the block."""
        data = self._blocks.export_block(block)
        if self._stream is None:
            self._memory[place] = data
            return
        # This also waits for earlier copies out of the same place, which run on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(data.device))
        with torch.cuda.stream(self._stream):
            self._memory[place].copy_(data, non_blocking=True)
        data.record_stream(self._stream)
        self._written[place] = self._stream.record_event()

    def get(self, place: int, block: int) -> None:
        """Copy a place into a block. Work that is queued on the device from now on sees the copy."""
        if self._stream is not None:
            torch.cuda.current_stream(self._blocks.device).wait_event(self._written[place])
        self.send(self._memory[place], block)

    def send(self, data: Tensor, block: int) -> None:
        """Copy bytes on the host, uint8 [block_bytes], into a block."""
        self._blocks.import_block(block, data.to(self._blocks.device, non_blocking=True))

    def read(self, place: int) -> Tensor:
        """The bytes in a place, uint8 [block_bytes]; waits until they have arrived."""
        if self._stream is not None:
            self._written[place].synchronize()
        return self._memory[place]
