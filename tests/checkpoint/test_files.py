"""Files are written completely or not at all; the error says why one could not be written."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from quantkit.checkpoint import files
from quantkit.checkpoint.files import disk_errors, write_json, write_tensors
from quantkit.errors import ArtifactError, ResourceError


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "x"), ResourceError, "disk is full; free some space and run the same command again"),
        (OSError(errno.EDQUOT, "x"), ResourceError, "disk is full"),
        (SafetensorError("I/O error: x (os error 28)"), ResourceError, "disk is full"),
        (OSError(errno.EIO, "Input/output error"), ArtifactError, "cannot be written .*Input/output error"),
        (SafetensorError("other"), ArtifactError, "cannot be written .*other"),
    ],
)
def test_disk_errors_are_explained(error: Exception, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=f"^place: .*{words}"), disk_errors(Path("place")):
        raise error


@pytest.mark.parametrize(
    ("write", "old", "new"),
    [(write_tensors, {"t": torch.zeros(9)}, {"t": torch.ones(9)}), (write_json, {"a": 1}, {"a": 2})],
)
def test_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Any], None], old: Any, new: Any
) -> None:
    path = tmp_path / "file"
    write(path, old)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(ResourceError):
        write(path, new)
    assert path.read_bytes() == before


def test_tensors_need_not_be_contiguous(tmp_path: Path) -> None:
    value = torch.arange(6.0).view(2, 3).T
    write_tensors(tmp_path / "t.safetensors", {"t": value})
    assert load_file(tmp_path / "t.safetensors")["t"].equal(value)
