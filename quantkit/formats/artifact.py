"""Write an artifact's metadata, and read the packed weights of an artifact."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.files import disk_errors, write_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.safetensors_header import quoted
from quantkit.errors import FormatError
from quantkit.formats import FORMATS, EngineSupport, Format, ModuleSchemes, format_of
from quantkit.formats.rotated import OnlineHadamard, add_transform, mark_unsupported, split_transform
from quantkit.methods.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.methods.grid import QuantizedWeight

#: Endings and names of files that are not copied from the source: weights of any kind, and files that are written anew.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_WRITTEN_ANEW = (
    "config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantkit.json",
    "README.md",
    "README.base.md",
)


def write_metadata(
    source: Checkpoint, folder: Path, format_name: str, schemes: ModuleSchemes, online: OnlineHadamard | None
) -> None:
    """Write all of an artifact except weights, report and model card: config, tokenizer, generation settings, licence.

    `online` is the Hadamard transform that a rotated model needs at run time; None for other models.
    """
    with disk_errors(folder):
        for path in sorted(source.folder.iterdir()):
            if path.is_file() and not path.name.endswith(_NOT_COPIED) and path.name not in _WRITTEN_ANEW:
                shutil.copyfile(path, folder / path.name)
    quantization = FORMATS[format_name].config(schemes)
    if online:
        quantization = add_transform(quantization, online)
    # A head that is quantized or rotated has its own tensors, so it is no longer the embedding.
    untied = {"tie_word_embeddings": False} if online or schemes.get("lm_head") is not None else {}
    write_json(folder / "config.json", source.config | untied | {"quantization_config": quantization})
    for name in FORMATS[format_name].extra_config_files:
        write_json(folder / name, quantization)


class PackedReader:
    """Reads the packed matrices of an artifact that quantkit or another tool wrote.

    Attributes:
        format: the artifact's format.
        online: the Hadamard transform that the inputs of some matrices need; None if there is none.
        extra_quantization: what is quantized in addition to weights, see `Format`. It is ignored here.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """
        Raises:
            FormatError: the format or its config cannot be read, or there is no packed matrix.
        """
        where = checkpoint.folder / "config.json"
        self._checkpoint = checkpoint
        stated: dict[str, Any] = checkpoint.config["quantization_config"]
        if not isinstance(stated, dict):
            raise FormatError(f"{where}: quantization_config is not an object; fetch the file again")
        try:
            self._config, self.online = split_transform(stated)
            self.format: Format = format_of(self._config)
            marker = "." + self.format.suffixes[0]
            self.modules = [name.removesuffix(marker) for name in checkpoint.names_under("") if name.endswith(marker)]
            self._schemes = self.format.schemes(self._config, self.modules)
            self.extra_quantization = self.format.extra_quantization(self._config)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise FormatError(f"{where}: quantization_config is incomplete ({error!r:.120}); fetch the file again") from None
        if not self.modules:
            raise FormatError(f"{where}: says {self.format.name}, but no shard holds a packed matrix; fetch the model again")
        for module in self.modules:
            info = checkpoint.tensors[module + marker]
            if info.dtype != "I32" or len(info.shape) != 2 or 0 in info.shape:
                raise FormatError(f"{info.file}: {quoted(module + marker)} is not an int32 matrix, so it cannot be read")

    def scheme(self, module: str) -> Scheme:
        """How a packed matrix is quantized.

        Raises:
            FormatError: config.json says that the matrix is not quantized.
        """
        scheme = self._schemes[module]
        if scheme is None:
            where = self._checkpoint.folder / "config.json"
            raise FormatError(f"{where}: says {quoted(module)} is not quantized, but it is packed; fetch the model again")
        return scheme

    def engines(self) -> list[EngineSupport]:
        """Which engines load the artifact."""
        engines = self.format.engines({self.scheme(module) for module in self.modules})
        return mark_unsupported(engines) if self.online else engines

    def shape(self, module: str) -> tuple[int, int]:
        """(N, K) of a packed matrix, from the header alone; K is rounded up if rows end within a word."""
        info, bits = self._checkpoint.tensors[f"{module}.{self.format.suffixes[0]}"], self.scheme(module).bits
        return self.format.dense_shape(info.shape, bits)

    def read(self, module: str) -> "QuantizedWeight":
        """Read a packed matrix whose groups are in the order of its columns.

        Raises:
            FormatError: its tensors are missing or disagree with config.json, or its groups are permuted.
        """
        return self._decoded(module, self._stored(module))

    def read_sorted(self, module: str) -> "tuple[QuantizedWeight, Tensor | None]":
        """Read a packed matrix, and int64 [K], which column of the input each of its columns multiplies (None: the same).

        Raises:
            FormatError: its tensors are missing or disagree with config.json.
        """
        scheme = self.scheme(module)
        try:
            tensors, order = self.format.sort_groups(self._stored(module), scheme)
        except FormatError as error:
            raise FormatError(f"{self._checkpoint.folder}: {quoted(module)}: {error}") from None
        return self._decoded(module, tensors), order

    def dense(self, module: str) -> "Tensor":
        """The dequantized values of a packed matrix, float32 [N, K].

        Raises:
            FormatError: its tensors are missing or disagree with config.json.
        """
        weight, order = self.read_sorted(module)
        values = weight.dequantize()
        return values if order is None else values[:, order.argsort()]

    def _stored(self, module: str) -> "dict[str, Tensor]":
        names = {suffix: f"{module}.{suffix}" for suffix in self.format.suffixes}
        stored = self._checkpoint.read(name for name in names.values() if name in self._checkpoint.tensors)
        return {suffix: stored[name] for suffix, name in names.items() if name in stored}

    def _decoded(self, module: str, tensors: "dict[str, Tensor]") -> "QuantizedWeight":
        scheme = self.scheme(module)
        try:
            return self.format.decode(tensors, scheme, self._config)
        except KeyError as error:
            raise FormatError(f"{self._checkpoint.folder}: {quoted(module)} lacks {error}; fetch the model again") from None
        except FormatError as error:
            raise FormatError(f"{self._checkpoint.folder}: {quoted(module)}: {error}") from None


def dense_reader(checkpoint: Checkpoint) -> "Callable[[list[str]], dict[str, Tensor]]":
    """A function that reads tensors by name and dequantizes those that are stored packed.

    Raises:
        FormatError: the checkpoint is quantized in a format that cannot be read.
    """
    if "quantization_config" not in checkpoint.config:
        return checkpoint.read
    packed = PackedReader(checkpoint)
    modules = set(packed.modules)

    def read(names: list[str]) -> "dict[str, Tensor]":
        dense = {}
        for name in names:
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and module in modules:
                dense[name] = packed.dense(module)
            else:
                dense |= checkpoint.read([name])
        return dense

    return read


def online_hadamard(checkpoint: Checkpoint) -> OnlineHadamard | None:
    """`PackedReader.online`; None for a checkpoint that is not quantized.

    Raises:
        FormatError: see `PackedReader`.
    """
    return PackedReader(checkpoint).online if "quantization_config" in checkpoint.config else None


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """Stored bits per weight of the packed matrices; of all matrices if the checkpoint is not quantized."""
    if "quantization_config" not in checkpoint.config:
        matrices = [info for info in checkpoint.tensors.values() if len(info.shape) == 2]
        return 8 * sum(info.nbytes for info in matrices) / sum(info.elements for info in matrices)
    packed = PackedReader(checkpoint)
    bits = weights = 0
    for module in packed.modules:
        rows, columns = packed.shape(module)
        bits += 8 * sum(
            checkpoint.tensors[name].nbytes
            for suffix in packed.format.suffixes
            if suffix not in packed.format.metadata_suffixes and (name := f"{module}.{suffix}") in checkpoint.tensors
        )
        weights += rows * columns
    return bits / weights
