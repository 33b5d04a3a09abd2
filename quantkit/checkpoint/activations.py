"""Hidden states between two blocks, kept on disk so that a killed run goes on from them, and in memory while they fit."""

import os
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.writer import disk_errors, sync
from quantkit.errors import ArtifactError


class Activations:
    """One boundary's hidden states, [rows, T, D], the rows of all streams one after another.

    In memory one buffer serves all boundaries: a row's output replaces its input. Over the memory limit each boundary is
    a memory-mapped file of its own, whose pages the system may drop.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, in_memory: bool) -> None:
        """Reserve a boundary at `path`; an existing file's values are loaded.

        Raises:
            ArtifactError: the file has another size.
            ResourceError: the disk is full.
        """
        self.path, self._in_memory = path, in_memory
        size = torch.Size(shape).numel() * dtype.itemsize
        exists = path.exists()
        if exists and path.stat().st_size != size:
            raise ArtifactError(f"{path}: has the wrong size; pass --overwrite to start the run anew")
        if in_memory:
            self.tensor = torch.empty(shape, dtype=dtype)
            if exists:
                with path.open("rb") as file:
                    file.readinto(_bytes(self.tensor))
            return
        with disk_errors(path), path.open("ab") as file:
            # Without reserved blocks a full disk would be a bus error at some later store.
            os.posix_fallocate(file.fileno(), 0, size)
        numel = torch.Size(shape).numel()
        self.tensor = torch.from_file(str(path), shared=True, size=numel, dtype=dtype).view(shape)

    def following(self, path: Path) -> "Activations":
        """The next boundary, to be filled row by row while this one is read."""
        if not self._in_memory:
            return Activations(path, tuple(self.tensor.shape), self.tensor.dtype, in_memory=False)
        # The buffer moves on to the next boundary; this one's values stay in its file.
        successor = object.__new__(Activations)
        successor.path, successor._in_memory, successor.tensor = path, True, self.tensor
        return successor

    def save(self) -> None:
        """Flush to disk.

        Raises:
            ResourceError: the disk is full.
        """
        with disk_errors(self.path):
            if self._in_memory:
                scratch = self.path.with_name(self.path.name + ".tmp")
                with scratch.open("wb") as file:
                    file.write(_bytes(self.tensor))
                sync(scratch)
                scratch.replace(self.path)
            else:
                sync(self.path)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
