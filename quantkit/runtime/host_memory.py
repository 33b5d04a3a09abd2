"""Copies of KV blocks in host memory, and in a file behind it: places and bytes, no names.

From a GPU the copies run beside the next forward, on a stream of their own and into pinned memory. On a CPU they are copies.
"""

import contextlib
import hashlib
import os
import shutil
import weakref
from pathlib import Path
from tempfile import mkstemp
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from quantkit.errors import ResourceError
from quantkit.usage import available_memory

#: Share of the free disk that the file takes at most, as for memory.
_DISK_SHARE = 0.5


class Blocks(Protocol):
    """What holds the blocks on the device.

    Attributes:
        block_bytes: size of one over all layers.
        device: where they are.
    """

    block_bytes: int
    device: torch.device

    def export_block(self, block: int) -> Tensor:
        """All bytes of a block, uint8 [block_bytes], on the device."""
        ...

    def import_block(self, block: int, data: Tensor) -> None:
        """Set all bytes of a block from uint8 [block_bytes] on the device."""
        ...


class HostMemory:
    """A fixed number of places for blocks."""

    def __init__(self, blocks: Blocks, places: int) -> None:
        """
        Raises:
            ResourceError: there is not that much memory.
        """
        on_gpu = blocks.device.type == "cuda"
        asked, free = places * blocks.block_bytes, available_memory()
        if asked > free:
            found = f"--kv-offload: there are {free / 2**30:.1f} GiB of free memory and not {asked / 2**30:,.1f}"
            raise ResourceError(f"{found}; ask for less")
        self._blocks, self.places = blocks, places
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


class BlockFile:
    """Places for blocks in a scratch file, which goes when this does.

    What comes back is what was written or nothing: the caller keeps a digest of every block.
    """

    def __init__(self, folder: Path, block_bytes: int) -> None:
        """
        Raises:
            ResourceError: no file can be made in the folder.
        """
        try:
            number, name = mkstemp(dir=folder, prefix="quantkit-kv-", suffix=".blocks")
            self.places = int(_DISK_SHARE * shutil.disk_usage(folder).free) // block_bytes
        except OSError as error:
            found = f"--kv-offload-dir {folder}: cannot be written to ({error.strerror})"
            raise ResourceError(f"{found}; name a folder that can") from None
        self.path, self._size = Path(name), block_bytes
        self._file = os.fdopen(number, "w+b", buffering=0)
        weakref.finalize(self, _discard, self._file, self.path)

    def write(self, place: int, data: Tensor) -> bytes | None:
        """Store uint8 [block_bytes]; its digest, or None where the disk does not take it."""
        view = data.numpy().data
        try:
            self._file.seek(place * self._size)
            whole = self._file.write(view) == self._size
        except OSError:
            return None
        return hashlib.sha256(view).digest() if whole else None

    def read(self, place: int, digest: bytes) -> Tensor | None:
        """What was stored, or None where it cannot be read or is not what was stored."""
        try:
            self._file.seek(place * self._size)
            data = self._file.read(self._size)
        except OSError:
            return None
        if hashlib.sha256(data).digest() != digest:
            return None
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _discard(file: BinaryIO, path: Path) -> None:
    with contextlib.suppress(OSError):
        file.close()
        path.unlink(missing_ok=True)
