"""Write single files so that each is either complete and flushed to disk, or does not exist."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from quantkit.errors import ArtifactError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within the context, a full disk becomes a `ResourceError` and any other failure to write an `ArtifactError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if full:
            raise ResourceError(
                f"{path}: the disk is full; free some space and run the same command again, finished blocks are kept"
            ) from None
        raise ArtifactError(f"{path}: cannot be written ({error})") from None


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write a safetensors file, complete and flushed, or not at all."""
    from safetensors.torch import save_file

    scratch = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata={"format": "pt"})
        sync(scratch)
        scratch.replace(path)
        sync(path.parent)


def write_json(path: Path, value: Json) -> None:
    """Write indented JSON: complete and flushed, or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, complete and flushed, or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        scratch.write_text(text, encoding="utf-8")
        sync(scratch)
        scratch.replace(path)
