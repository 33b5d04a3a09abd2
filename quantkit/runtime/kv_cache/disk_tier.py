"""Copies of KV blocks in a scratch file: places and bytes, no names.

The file has no name either, so that none is left behind however the process ends.

A thread writes, so that no step waits for the disk: a block comes back from memory until it is written. What the disk is too
slow for, or does not take, is not there any more when it is asked for.
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

#: Share of the free disk that the file takes at most, as for memory.
_DISK_SHARE = 0.5


class DiskTier:
    """Places for blocks. What comes back is what was written, or nothing: the digest of each block stays in memory.

    All methods are for one thread; the writer keeps the file alive until it is closed.

    Attributes:
        places: that the disk has room for.
        room: blocks that may wait to be written.
        lost: blocks that the disk did not take, or did not give back intact.
    """

    def __init__(self, folder: Path, block_bytes: int, room: int) -> None:
        """
        Raises:
            ResourceError: no file can be made in the folder.
        """
        try:
            self._opened = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  The writer closes it.
            self.places = int(_DISK_SHARE * shutil.disk_usage(folder).free) // block_bytes
        except OSError as error:
            found = f"--kv-offload-dir {folder}: cannot be written to ({error.strerror})"
            raise ResourceError(f"{found}; name a folder that can") from None
        self._file, self.room, self.lost, self._size = self._opened.fileno(), room, 0, block_bytes
        #: Of all that both threads use; notified when it changes. Reentrant: the collector may close the file in either one.
        self._lock = threading.Condition()
        #: What is not written yet, by place, the oldest first; of what is, the digests.
        self._waiting: dict[int, Tensor] = {}
        self._digests: dict[int, bytes] = {}
        self._closed = False
        self._writer = threading.Thread(target=self._write_all, name="kv-offload", daemon=True)
        self._writer.start()

    @property
    def busy(self) -> bool:
        """Whether as many blocks wait as may."""
        with self._lock:
            return len(self._waiting) >= self.room

    def write(self, place: int, data: Tensor) -> None:
        """Have uint8 [block_bytes] written to a place, whatever is there; it must not change any more. Not while busy."""
        with self._lock:
            assert len(self._waiting) < self.room
            self._digests.pop(place, None)
            self._waiting[place] = data
            self._lock.notify_all()

    def holds(self, place: int) -> bool:
        """Whether the block in a place is written or waits to be."""
        with self._lock:
            return place in self._waiting or place in self._digests

    def read(self, place: int) -> Tensor | None:
        """The block in a place, or None where it cannot be read or is not what was written."""
        with self._lock:
            if place in self._waiting:
                return self._waiting[place]
            digest = self._digests.get(place)
        # Nothing is written there meanwhile: it is this thread that would have to ask for it.
        with contextlib.suppress(OSError):
            data = bytearray(os.pread(self._file, self._size, place * self._size))
            if hashlib.sha256(data).digest() == digest:
                return torch.frombuffer(data, dtype=torch.uint8)
        with self._lock:
            self.lost += 1
        return None

    def close(self) -> None:
        """Forget all blocks and give their room back, once the write that runs has ended."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if threading.current_thread() is not self._writer:
            self._writer.join()

    def _write_all(self) -> None:
        """What the writer does until the file is closed."""
        while job := self._next():
            place, data = job
            digest = self._stored(place, data)
            with self._lock:
                if self._waiting.get(place) is data:  # and no other block was put there meanwhile
                    del self._waiting[place]
                    if digest is None:
                        self.lost += 1
                    else:
                        self._digests[place] = digest
                    self._lock.notify_all()
        with contextlib.suppress(OSError):
            self._opened.close()

    def _next(self) -> tuple[int, Tensor] | None:
        """The block that has waited longest, as soon as there is one; None when the file is closed."""
        with self._lock:
            self._lock.wait_for(lambda: self._waiting or self._closed)
            return None if self._closed else next(iter(self._waiting.items()))

    def _stored(self, place: int, data: Tensor) -> bytes | None:
        """The digest of a block that is now in the file; None where the disk does not take it."""
        view = data.numpy().data
        try:
            whole = os.pwrite(self._file, view, place * self._size) == self._size
        except OSError:
            return None
        return hashlib.sha256(view).digest() if whole else None
