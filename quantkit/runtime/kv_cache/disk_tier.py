"""Copies of KV blocks in a scratch file. This tier knows numbered places and bytes; `offload` knows which block is where.

The file has no name in its folder, so none is left over however the process ends.

A thread writes, so no step waits for the disk. Until a block is written, it is read back from memory. A block that the disk
could not take is reported as missing when it is asked for.
"""

import contextlib
import hashlib
import os
import shutil
import threading
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

from quantkit.errors import ResourceError

#: Most that the file takes of the free disk space; caches in memory take the same share.
_DISK_SHARE = 0.5


class DiskTier:
    """Places for blocks on disk. A block is returned intact or not at all: the digest of each block stays in memory.

    All methods must be called from one thread. The writer thread keeps the file alive until it is closed.

    Attributes:
        places: number of blocks that the disk has room for.
        room: most blocks that may wait to be written.
        lost: blocks that the disk did not take or did not return intact.
    """

    def __init__(self, folder: Path, block_bytes: int, room: int) -> None:
        """
        Raises:
            ResourceError: no file can be created in the folder.
        """
        try:
            self._opened = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  The writer closes it.
            self.places = int(_DISK_SHARE * shutil.disk_usage(folder).free) // block_bytes
        except OSError as error:
            found = f"--kv-offload-dir {folder}: cannot be written to ({error.strerror})"
            raise ResourceError(f"{found}; name a folder that can") from None
        self._file, self.room, self.lost, self._size = self._opened.fileno(), room, 0, block_bytes
        #: Guards everything that both threads use, and is notified of changes. Reentrant, because the garbage collector may
        #: close the file in either thread.
        self._lock = threading.Condition()
        #: Place -> block that is not written yet, the oldest first. Place -> digest of a written block.
        self._waiting: dict[int, Tensor] = {}
        self._digests: dict[int, bytes] = {}
        self._closed = False
        self._writer = threading.Thread(target=self._write_all, name="kv-offload", daemon=True)
        self._writer.start()

    @property
    def busy(self) -> bool:
        """Whether no further block may wait to be written."""
        with self._lock:
            return len(self._waiting) >= self.room

    def write(self, place: int, data: Tensor) -> None:
        """Have uint8 [block_bytes] written to a place, over what is there. The tensor must not change any more. Not while
        busy.
        """
        with self._lock:
            assert len(self._waiting) < self.room
            self._digests.pop(place, None)
            self._waiting[place] = data
            self._lock.notify_all()

    def holds(self, place: int) -> bool:
        """Whether the block in a place is written or waits to be written."""
        with self._lock:
            return place in self._waiting or place in self._digests

    def read(self, place: int) -> Tensor | None:
        """The block in a place; None if it cannot be read or differs from what was written."""
        with self._lock:
            if place in self._waiting:
                return self._waiting[place]
            digest = self._digests.get(place)
        # Nothing is written there meanwhile, because only this thread could ask for that.
        with contextlib.suppress(OSError):
            data = bytearray(os.pread(self._file, self._size, place * self._size))
            if hashlib.sha256(data).digest() == digest:
                return torch.frombuffer(data, dtype=torch.uint8)
        with self._lock:
            self.lost += 1
        return None

    def close(self) -> None:
        """Forget all blocks and free the disk space, once the current write has ended."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if threading.current_thread() is not self._writer:
            self._writer.join()

    def _write_all(self) -> None:
        """Write waiting blocks until the file is closed; runs in the writer thread."""
        while job := self._next():
            place, data = job
            digest = self._stored(place, data)
            with self._lock:
                if self._waiting.get(place) is data:  # Otherwise another block was put there meanwhile.
                    del self._waiting[place]
                    if digest is None:
                        self.lost += 1
                    else:
                        self._digests[place] = digest
                    self._lock.notify_all()
        with contextlib.suppress(OSError):
            self._opened.close()

    def _next(self) -> tuple[int, Tensor] | None:
        """Wait for a block to write; returns the one that has waited longest, and None when the file is closed."""
        with self._lock:
            self._lock.wait_for(lambda: self._waiting or self._closed)
            return None if self._closed else next(iter(self._waiting.items()))

    def _stored(self, place: int, data: Tensor) -> bytes | None:
        """Write a block; returns its digest, or None if the disk did not take it."""
        view = data.numpy().data
        try:
            whole = os.pwrite(self._file, view, place * self._size) == self._size
        except OSError:
            return None
        return hashlib.sha256(view).digest() if whole else None
