"""What a format is, and helpers that several formats share. Imports torch only inside functions that handle tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantkit.errors import FormatError
from quantkit.methods.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.methods.grid import QuantizedWeight

#: Module path -> how the matrix is quantized; None for a matrix that stays in 16 bit.
ModuleSchemes = Mapping[str, Scheme | None]


@dataclass(frozen=True)
class EngineSupport:
    """Whether an engine loads an artifact, and what to know about it.

    Attributes:
        name: "vLLM", "SGLang" or "transformers".
        loads: whether it does.
        note: why not, or what is needed.
    """

    name: str
    loads: bool
    note: str = ""


def keep_order(tensors: Mapping[str, Tensor], _scheme: Scheme) -> tuple[dict[str, Tensor], Tensor | None]:
    """`sort_groups` of formats whose groups are always in the order of the columns."""
    return dict(tensors), None


@dataclass(frozen=True)
class Format:
    """One on-disk format. `quantkit.formats.FORMATS` lists them.

    Attributes:
        name: value of `--format`.
        suffixes: suffixes of a quantized matrix's tensors, without the leading dot; the first names the packed codes.
        encode: (weight, model dtype) -> suffix -> tensor.
        decode: (suffix -> tensor, the first one an int32 matrix, scheme, quantization_config) -> weight.
        config: schemes of all modules -> the `quantization_config` of config.json.
        schemes: (quantization_config, module paths) -> schemes of these modules.
        unsupported_reason: (scheme, rows, columns) -> why the format cannot hold such a matrix; None if it can.
        engines: schemes in use -> which engines load the artifact.
        dense_shape: (shape of the first suffix's tensor, bits) -> (N, K), with K rounded up to whole words.
        stored_bytes: (scheme, rows, columns, bytes per value of the model's dtype) -> bytes of a matrix's tensors.
        packed_rows, packed_columns: scheme -> whether int32 words hold values of several rows (N), or of several columns
            (K). Tensor parallelism cannot cut through a word.
        quantized_head: engines that read a quantized output head -> a note about it, "" for none. Other engines take the
            head for a dense matrix.
        metadata_suffixes: those of `suffixes` that do not count towards the bits per weight.
        extra_config_files: files that repeat the `quantization_config` outside config.json.
        holds_transform: whether config.json can state the Hadamard transform of a rotated model.
        sort_groups: (suffix -> tensor, scheme) -> the tensors with their columns sorted by group, and int64 [K], which
            column of the input each column multiplies; None where the columns were in order.
        extra_quantization: quantization_config -> what it quantizes in addition to weights, each with the endings of the
            tensors for it.
    """

    name: str
    suffixes: tuple[str, ...]
    encode: Callable[[QuantizedWeight, torch.dtype], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor], Scheme, Mapping[str, Any]], QuantizedWeight]
    config: Callable[[ModuleSchemes], dict[str, Any]]
    schemes: Callable[[Mapping[str, Any], list[str]], dict[str, Scheme | None]]
    unsupported_reason: Callable[[Scheme, int, int], str | None]
    engines: Callable[[set[Scheme]], list[EngineSupport]]
    dense_shape: Callable[[tuple[int, ...], int], tuple[int, int]]
    stored_bytes: Callable[[Scheme, int, int, int], int]
    packed_rows: Callable[[Scheme], bool]
    packed_columns: Callable[[Scheme], bool]
    quantized_head: Mapping[str, str] = field(default_factory=dict)
    metadata_suffixes: tuple[str, ...] = ()
    extra_config_files: tuple[str, ...] = ()
    holds_transform: bool = False
    sort_groups: Callable[[Mapping[str, Tensor], Scheme], tuple[dict[str, Tensor], Tensor | None]] = keep_order
    extra_quantization: Callable[[Mapping[str, Any]], dict[str, tuple[str, ...]]] = lambda _: {}

    def support_of(self, engine: str, used: set[Scheme]) -> EngineSupport:
        """Whether the engine of that name loads an artifact with the schemes `used`."""
        return support_of(engine, self.engines(used), self.name)


def support_of(engine: str, supports: list[EngineSupport], format_name: str) -> EngineSupport:
    """The entry of that engine; an engine that a format does not mention does not load it."""
    unknown = EngineSupport(engine, False, f"it does not read the {format_name} format")
    return next((support for support in supports if support.name == engine), unknown)


def cast_exactly(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast `values` (float32) to `dtype` without changing any of them.

    Raises:
        FormatError: a scale is not representable.
    """
    import torch

    cast = values.to(dtype)
    if not torch.equal(cast.float(), values):
        name = str(dtype).removeprefix("torch.")
        raise FormatError(f"scales are not exact in {name}, and rounding them would change the model; use another format")
    return cast


def parse_scheme(bits: Any, group_size: Any, symmetric: Any) -> Scheme:
    """The scheme that a config states.

    Raises:
        FormatError: quantkit cannot read such a scheme.
    """
    whole = isinstance(bits, int) and isinstance(group_size, int)
    if not whole or bits not in (2, 3, 4, 8) or not (group_size == -1 or group_size > 0):
        found = f"bits {bits!r:.20} and group size {group_size!r:.20}"
        raise FormatError(f"{found} cannot be read; bits must be 2, 3, 4 or 8, the group size -1 (whole rows) or positive")
    return Scheme(bits, group_size, bool(symmetric))


def count_groups(scheme: Scheme, columns: int) -> int:
    """Number of groups in a stored row.

    Raises:
        FormatError: the last group would be shorter than the others.
    """
    if columns % scheme.group_columns(columns):
        raise FormatError(
            f"its {columns} columns are not a multiple of the group size {scheme.group_size}; that cannot be read"
        )
    return scheme.groups(columns)


def checked_tensor(tensors: Mapping[str, Tensor], suffix: str, shape: tuple[int, ...], *, floating: bool = False) -> Tensor:
    """One tensor of a packed matrix, int32 or floating, in the shape that the config and the others call for.

    Raises:
        FormatError: it differs.
    """
    import torch

    tensor = tensors[suffix]
    if tuple(tensor.shape) != shape or (not tensor.is_floating_point() if floating else tensor.dtype != torch.int32):
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        wanted = f"{'floating' if floating else 'int32'} {list(shape)}"
        raise FormatError(f"{suffix} is {found}, config.json calls for {wanted}; fetch the model again")
    return tensor


def unsupported_group_size(scheme: Scheme, columns: int) -> str | None:
    """Why `scheme`'s groups do not fit rows of `columns` columns, with the sizes that do; None when they fit."""
    width = scheme.group_columns(columns)
    if columns % width == 0:
        return None
    fitting = [str(size) for size in (16, 32, 64, 96, 128, 192, 256) if columns % size == 0]
    return f"group size {width} does not divide {columns} columns; use {', '.join([*fitting, '-1'])}"


def module_patterns(modules: list[str], schemes: ModuleSchemes) -> list[str]:
    """Regular expressions that match exactly `modules` among `schemes`: one per ending where all blocks agree.

    Engines merge q/k/v and gate/up, so a pattern never covers only some blocks of an ending by accident: an ending whose
    blocks differ is spelled out block by block.
    """

    def ending(module: str) -> str:
        return re.sub(r"^.*\.\d+\.", "", module)

    chosen, found = set(modules), []
    for tail in dict.fromkeys(map(ending, modules)):
        alike = [module for module in schemes if ending(module) == tail]
        if all(module in chosen for module in alike):
            found.append(rf"^{re.escape(tail)}$" if alike == [tail] else rf".*\.\d+\.{re.escape(tail)}$")
        else:
            found.extend(rf"^{re.escape(module)}$" for module in alike if module in chosen)
    return found
