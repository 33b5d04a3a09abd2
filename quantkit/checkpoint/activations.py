"""Hidden states between two blocks: saved to disk so that a killed run can continue, and kept in memory if they fit."""

import os
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.files import disk_errors, sync
from quantkit.errors import ArtifactError


class Activations:
    """The hidden states at one boundary between blocks, [rows, T, D]: the rows of all streams one after another.

    In memory, one buffer serves all boundaries: the output of a row replaces its input. Above the memory limit, each boundary
    is a memory-mapped file of its own, whose pages the system may evict. Created by `reserve`, `load` or `following`.
    """

    def __init__(self, path: Path, tensor: Tensor, *, in_memory: bool) -> None:
        self.path, self.tensor, self._in_memory = path, tensor, in_memory

    @classmethod
    def reserve(cls, path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, in_memory: bool) -> "Activations":
        """A boundary to be filled. A file that an interrupted attempt left at `path` is overwritten.

        Raises:
            ResourceError: the disk is full.
        """
        if in_memory:
            return cls(path, torch.empty(shape, dtype=dtype), in_memory=True)
        with disk_errors(path), path.open("wb") as file:
            # Reserve the blocks now: on a full disk, a later store into the mapping would raise a bus error.
            os.posix_fallocate(file.fileno(), 0, _size(shape, dtype))
        return cls(path, _mapped(path, shape, dtype), in_memory=False)

    @classmethod
    def load(cls, path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, in_memory: bool) -> "Activations":
        """A boundary that `save` wrote.

        Raises:
            ArtifactError: the file is missing or has another size.
        """
        if not path.is_file() or path.stat().st_size != _size(shape, dtype):
            raise ArtifactError(f"{path}: missing, or its size has changed; pass --overwrite to start the run anew")
        if not in_memory:
            return cls(path, _mapped(path, shape, dtype), in_memory=False)
        tensor = torch.empty(shape, dtype=dtype)
        with path.open("rb") as file:
            file.readinto(_bytes(tensor))
        return cls(path, tensor, in_memory=True)

    def following(self, path: Path) -> "Activations":
        """The next boundary, to be filled row by row while this one is read."""
        if not self._in_memory:
            return Activations.reserve(path, tuple(self.tensor.shape), self.tensor.dtype, in_memory=False)
        # The next boundary takes over the buffer; the values of this one stay in its file.
        return Activations(path, self.tensor, in_memory=True)

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


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
