"""Read a Hugging Face checkpoint folder, trusting nothing in it.

Opening a folder checks its index, its headers and its sizes, so that damaged files are found before any work starts. Reading
a tensor checks its values. Tensors are copied out of the memory-mapped file, so that no mapping outlives the call, and peak
memory is the size of the tensors that were asked for. `map` is the exception.

Importing this module, and opening a folder, does not import torch; reading a tensor does.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from quantkit.checkpoint.safetensors_header import TensorInfo, quoted, read_header
from quantkit.errors import CheckpointError, NumericsError

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, is not UTF-8 JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; is this a Hugging Face model folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A shard opened by safetensors, whose errors become `CheckpointError`.

    Raises:
        CheckpointError: the file is missing, truncated or malformed.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except FileNotFoundError:
        raise CheckpointError(f"{path}: shard is missing; fetch it again") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: truncated or damaged ({reason}); fetch the file again") from None


class Checkpoint:
    """An opened checkpoint folder.

    Attributes:
        folder: its path.
        config: config.json, without a `quantization_config` that is null.
        files: the shards, sorted by name.
        tensors: the tensors of all shards, by name.
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder` and check its index, headers and sizes.

        Raises:
            CheckpointError: a file is missing, truncated, pickled or outside the folder, or two files disagree.
        """
        self.folder = folder
        self.config = read_json(folder / "config.json")
        if self.config.get("quantization_config", {}) is None:
            del self.config["quantization_config"]
        if not isinstance(self.config.get("model_type"), str):
            raise CheckpointError(f"{folder / 'config.json'}: has no 'model_type'; only Hugging Face models can be read")
        self.tensors: dict[str, TensorInfo] = {}
        self._prefetched: dict[str, Tensor] = {}
        weight_map = self._weight_map()
        for file in self.files:
            for name, info in read_header(file).items():
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise CheckpointError(f"{file}: tensor {quoted(name)} is also in {other}; fetch the model again")
                self.tensors[name] = info
        for name, file in weight_map.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise CheckpointError(
                    f"{folder / _INDEX}: says {quoted(name)} is in {file.name}, which does not hold it; fetch both again"
                )

    def _weight_map(self) -> dict[str, Path]:
        """The file of each tensor according to the index; empty if there is no index. Sets `files`."""
        index = self.folder / _INDEX
        if index.is_file():
            entries = read_json(index).get("weight_map")
            if not isinstance(entries, dict) or not entries or not all(isinstance(f, str) for f in entries.values()):
                raise CheckpointError(f"{index}: has no usable 'weight_map'; fetch the file again")
            present = {path.name for path in self.folder.iterdir()}
            for name in entries.values():
                if Path(name).name != name or name in ("", ".", ".."):
                    raise CheckpointError(f"{index}: names {quoted(name)}, which is outside the model's folder; refused")
                if name not in present:
                    raise CheckpointError(f"{index}: names {quoted(name)}, which is missing from {self.folder}; fetch it")
            self.files = [self.folder / name for name in sorted(set(entries.values()))]
            return {name: self.folder / file for name, file in entries.items()}
        if (self.folder / _SINGLE).is_file():
            self.files = [self.folder / _SINGLE]
            return {}
        pickles = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt*"))
        if pickles:
            raise CheckpointError(
                f"{pickles[0]}: pickled weights can run code and are not read; convert them to safetensors first"
            )
        raise CheckpointError(f"{self.folder}: holds no {_SINGLE} and no {_INDEX}; fetch the weights")

    def names_under(self, prefix: str) -> list[str]:
        """Names of the tensors whose name starts with `prefix`, sorted."""
        return sorted(name for name in self.tensors if name.startswith(prefix))

    def read(self, names: Iterable[str]) -> "dict[str, Tensor]":
        """Tensors by name, copied out of the shards to the CPU, in the dtype in which they are stored.

        Raises:
            CheckpointError: a tensor does not exist or its shard changed since it was opened.
            NumericsError: a floating-point tensor holds NaN or Inf.
        """
        by_file: dict[Path, list[str]] = {}
        tensors = {}
        for name in names:
            if name in self._prefetched:
                tensors[name] = self._prefetched.pop(name)
                continue
            if name not in self.tensors:
                raise CheckpointError(f"{self.folder}: tensor {quoted(name)} is missing; fetch the model again")
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, wanted in by_file.items():
            with _opened(file) as shard:
                for name in wanted:
                    tensors[name] = self._checked(name, shard.get_tensor(name).clone())
        return tensors

    def map(self, name: str) -> "Tensor":
        """A tensor that stays in its file: a page of it takes memory once it is used, and the system can take it back.

        For large tables of which few rows are read, such as embeddings. The file must not be written to meanwhile; replacing
        it by another is harmless.

        Raises:
            CheckpointError, NumericsError: as `read`.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: tensor {quoted(name)} is missing; fetch the model again")
        file = self.tensors[name].file
        with _opened(file) as shard:
            self._checked(name, shard.get_tensor(name))
        with _opened(file) as shard:  # A new mapping, of which no page has been used.
            tensor: Tensor = shard.get_tensor(name)
        return tensor

    def _checked(self, name: str, tensor: "Tensor") -> "Tensor":
        """The tensor.

        Raises:
            CheckpointError: it is not what the header said when the folder was opened.
            NumericsError: it holds NaN or Inf.
        """
        expected = self.tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (expected.torch_dtype, expected.shape):
            raise CheckpointError(f"{expected.file}: changed while it was being read; run the command again")
        _require_finite(tensor, name, expected.file)
        return tensor

    @contextmanager
    def prefetch(self, names: Iterable[str]) -> Iterator[None]:
        """Read `names` in one go. Within the context, `read` returns each of them once without opening its shard again.

        Raises:
            CheckpointError, NumericsError: as `read`.
        """
        self._prefetched = self.read(names)
        try:
            yield
        finally:
            self._prefetched = {}

    def require_unquantized(self) -> None:
        """Refuse a checkpoint that is already quantized.

        Raises:
            CheckpointError: it is.
        """
        method = self.config.get("quantization_config")
        if method is not None:
            kind = method.get("quant_method", "unknown method") if isinstance(method, dict) else "unknown method"
            raise CheckpointError(
                f"{self.folder / 'config.json'}: the model is already quantized ({kind}); start from the original, "
                "or use `quantkit convert` to change its format"
            )


def _require_finite(tensor: "Tensor", name: str, file: Path) -> None:
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or not tensor.numel():
        return
    # `aminmax` propagates NaN and Inf, and needs no mask as large as the tensor.
    low, high = tensor.aminmax()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NumericsError(f"{file}: tensor {quoted(name)} holds NaN or Inf; the checkpoint is damaged, fetch it again")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
