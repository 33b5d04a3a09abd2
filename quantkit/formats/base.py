"""What a format is, and the facts about a model that its config states."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.scheme import Scheme

#: module path -> how it is quantized; None for a matrix that stays in 16 bit.
Plan = Mapping[str, Scheme | None]


@dataclass(frozen=True)
class Engine:
    """Whether an engine loads an artifact, and what to know about it."""

    name: str
    loads: bool
    note: str = ""


@dataclass(frozen=True)
class Format:
    """One on-disk format, as functions.

    Attributes:
        name: as typed after `--format`.
        suffixes: tensor suffixes of a quantized matrix, without the leading dot.
        encode: (weight, model dtype) -> suffix -> tensor.
        decode: (suffix -> tensor, the first one an int32 matrix, scheme, quantization_config) -> weight.
        config: plan -> the `quantization_config` of config.json.
        schemes: (quantization_config, module paths) -> plan.
        problem: (scheme, rows, columns) -> why the format cannot hold such a matrix, or None.
        engines: schemes in use -> what loads the result.
        dense_shape: (shape of the first suffix's tensor, bits) -> (N, K), K rounded up to whole words.
        beside: quantization_config -> what it quantizes beside weights, each with the endings of the tensors for that.
    """

    name: str
    suffixes: tuple[str, ...]
    encode: Callable[[QuantizedWeight, torch.dtype], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor], Scheme, Mapping[str, Any]], QuantizedWeight]
    config: Callable[[Plan], dict[str, Any]]
    schemes: Callable[[Mapping[str, Any], list[str]], dict[str, Scheme | None]]
    problem: Callable[[Scheme, int, int], str | None]
    engines: Callable[[set[Scheme]], list[Engine]]
    dense_shape: Callable[[tuple[int, ...], int], tuple[int, int]]
    beside: Callable[[Mapping[str, Any]], dict[str, tuple[str, ...]]] = lambda _: {}


def exact(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (float32) as `dtype`, refusing to change any.

    Raises:
        FormatError: a scale is not representable.
    """
    cast = values.to(dtype)
    if not torch.equal(cast.float(), values):
        name = str(dtype).removeprefix("torch.")
        raise FormatError(f"scales are not exact in {name}, and rounding them would change the model; use another format")
    return cast


def stated(bits: Any, group_size: Any, symmetric: Any) -> Scheme:
    """The scheme that a config states.

    Raises:
        FormatError: it is not one that can be read.
    """
    whole = isinstance(bits, int) and isinstance(group_size, int)
    if not whole or bits not in (2, 3, 4, 8) or not (group_size == -1 or group_size > 0):
        found = f"bits {bits!r:.20} and group size {group_size!r:.20}"
        raise FormatError(f"{found} cannot be read; bits are 2, 3, 4 or 8, a group is -1 (a row) or some columns")
    return Scheme(bits, group_size, bool(symmetric))


def whole_groups(scheme: Scheme, columns: int) -> int:
    """Groups in a stored row.

    Raises:
        FormatError: the last one would be shorter than the others.
    """
    if columns % scheme.group_columns(columns):
        raise FormatError(f"groups of {scheme.group_size} do not divide its {columns} columns, which cannot be read")
    return scheme.groups(columns)


def part(tensors: Mapping[str, Tensor], suffix: str, shape: tuple[int, ...], *, floating: bool = False) -> Tensor:
    """One tensor of a packed matrix, int32 or floating, in the shape that the config and the others call for.

    Raises:
        FormatError: it differs.
    """
    tensor = tensors[suffix]
    if tuple(tensor.shape) != shape or (not tensor.is_floating_point() if floating else tensor.dtype != torch.int32):
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        wanted = f"{'floating' if floating else 'int32'} {list(shape)}"
        raise FormatError(f"{suffix} is {found}, config.json calls for {wanted}; fetch the model again")
    return tensor


def group_problem(scheme: Scheme, columns: int) -> str | None:
    """Why `scheme`'s groups do not fit rows of `columns` columns, with the sizes that do; None when they fit."""
    width = scheme.group_columns(columns)
    if columns % width == 0:
        return None
    fitting = [str(size) for size in (16, 32, 64, 96, 128, 192, 256) if columns % size == 0]
    return f"group size {width} does not divide {columns} columns; use {', '.join([*fitting, '-1'])}"


def patterns(modules: list[str], plan: Plan) -> list[str]:
    """Regular expressions that match exactly `modules` among the plan's: one per ending where all blocks agree.

    Engines merge q/k/v and gate/up, so a pattern never covers only some blocks of an ending by accident: an ending whose
    blocks differ is spelled out block by block.
    """

    def ending(module: str) -> str:
        return re.sub(r"^.*\.\d+\.", "", module)

    chosen, found = set(modules), []
    for tail in dict.fromkeys(map(ending, modules)):
        alike = [module for module in plan if ending(module) == tail]
        if all(module in chosen for module in alike):
            found.append(rf"^{re.escape(tail)}$" if alike == [tail] else rf".*\.\d+\.{re.escape(tail)}$")
        else:
            found.extend(rf"^{re.escape(module)}$" for module in alike if module in chosen)
    return found
