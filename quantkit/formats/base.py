"""What a format is, and the facts about a model that its config states."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.methods.grid import QuantizedWeight, Scheme

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
        decode: (suffix -> tensor, scheme, quantization_config) -> weight.
        config: plan -> the `quantization_config` of config.json.
        schemes: (quantization_config, module paths) -> plan.
        problem: (scheme, rows, columns) -> why the format cannot hold such a matrix, or None.
        engines: schemes in use -> what loads the result.
        dense_shape: (shape of the first suffix's tensor, bits) -> (N, K).
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


def exact(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (float32) as `dtype`, refusing to change any.

    Raises:
        FormatError: a scale is not representable.
    """
    cast = values.to(dtype)
    if not torch.equal(cast.float(), values):
        raise FormatError(f"scales are not exact in {str(dtype).removeprefix('torch.')}; storing them would change the model")
    return cast


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
            found.append(rf".*{re.escape(tail)}$")
        else:
            found.extend(rf"^{re.escape(module)}$" for module in alike if module in chosen)
    return found
