"""Read the header of a safetensors file with the standard library, so that a model can be inspected without torch.

The layout (https://huggingface.co/docs/safetensors): the header's length as a little-endian uint64, the header as a JSON
object, then the tensors' bytes. The header gives each tensor's element type, shape and byte range. As safetensors itself
demands, the ranges must follow one another without a gap and end where the file ends.
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class ElementType(NamedTuple):
    """An element type: its attribute name in torch, and bytes per element."""

    torch_name: str
    nbytes: int


#: The element types that are read, by the name that safetensors gives them.
DTYPES: dict[str, ElementType] = {
    "F64": ElementType("float64", 8),
    "F32": ElementType("float32", 4),
    "F16": ElementType("float16", 2),
    "BF16": ElementType("bfloat16", 2),
    "I64": ElementType("int64", 8),
    "I32": ElementType("int32", 4),
    "I16": ElementType("int16", 2),
    "I8": ElementType("int8", 1),
    "U8": ElementType("uint8", 1),
    "BOOL": ElementType("bool", 1),
    "F8_E4M3": ElementType("float8_e4m3fn", 1),
    "F8_E5M2": ElementType("float8_e5m2", 1),
}

#: Longest header that is parsed, in bytes; safetensors has the same limit.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor.

    Attributes:
        file: the file that holds it.
        dtype: a key of `DTYPES`.
        shape: its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.elements * DTYPES[self.dtype].nbytes

    @property
    def is_floating_point(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The element type as torch has it. Imports torch."""
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype].torch_name)
        return dtype


def quoted(name: str) -> str:
    """A name that a file contains, as it appears in messages: quoted, escaped and at most 120 characters long."""
    return f"{name!r:.120}"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name, in alphabetical order.

    Raises:
        CheckpointError: the file is missing, truncated or malformed, or holds an element type that is not read.
    """
    try:
        header, data_bytes = _parse(path)
        entries = {name: _entry(name, value) for name, value in header.items() if name != "__metadata__"}
        _require_types(path, entries)
        _require_contiguous(entries, data_bytes)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: shard is missing; fetch it again") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: truncated or damaged ({reason}); fetch the file again") from None
    return {name: TensorInfo(path, entry.dtype, entry.shape) for name, entry in sorted(entries.items())}


class _Entry(NamedTuple):
    """A tensor's entry in a header; `start` and `end` count bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def _parse(path: Path) -> tuple[dict[str, Any], int]:
    """The header as JSON, and the number of bytes after it.

    Raises:
        ValueError: the file is too short, or its header is not a JSON object.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError("no header")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.get("__metadata__")
    usable = metadata is None or (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values()))
    if not usable:
        raise ValueError("__metadata__ does not map text to text")
    return header, size - 8 - length


def _entry(name: str, value: Any) -> _Entry:
    """A tensor's entry, its parts checked one by one.

    Raises:
        ValueError: a part is missing or of the wrong type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"the entry of tensor {quoted(name)} is not a JSON object")
    dtype = value.get("dtype")
    if not (isinstance(dtype, str) and dtype.isidentifier()):
        raise ValueError(f"tensor {quoted(name)} has no usable dtype")
    shape, offsets = _sizes(name, value.get("shape")), _sizes(name, value.get("data_offsets"))
    if len(offsets) != 2:
        raise ValueError(f"tensor {quoted(name)} needs two data_offsets")
    return _Entry(dtype, shape, start=offsets[0], end=offsets[1])


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    """A JSON list of unsigned 64-bit integers.

    Raises:
        ValueError: `value` is not one.
    """
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 1 << 64 for size in value):
        raise ValueError(f"tensor {quoted(name)} has no usable shape or data_offsets")
    return tuple(value)


def _require_types(path: Path, entries: dict[str, _Entry]) -> None:
    """Refuse element types that are not read, and shapes that torch cannot hold.

    Raises:
        CheckpointError: a tensor has one.
    """
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise CheckpointError(f"{path}: tensor {quoted(name)} has dtype {entry.dtype:.20}; only {known} can be read")
        if max(entry.shape, default=0) >= 1 << 63:
            raise CheckpointError(f"{path}: tensor {quoted(name)} has an impossible shape; fetch the file again")


def _require_contiguous(entries: dict[str, _Entry], data_bytes: int) -> None:
    """Check that the byte ranges fit the shapes, follow one another without a gap, and cover `data_bytes` bytes.

    Raises:
        ValueError: they do not.
    """
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        nbytes = math.prod(entry.shape) * DTYPES[entry.dtype].nbytes
        if entry.start != position or entry.end - entry.start != nbytes:
            raise ValueError(f"invalid byte range of tensor {quoted(name)}")
        position = entry.end
    if position != data_bytes:
        raise ValueError(f"{data_bytes} bytes after the header, which describes {position}")
