"""QuantizedWeight <-> the tensors and configs that other engines load, both ways."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats.awq import AWQ
from quantkit.formats.base import Engine, Format, Plan
from quantkit.formats.compressed_tensors import COMPRESSED_TENSORS
from quantkit.formats.gptq import GPTQ, sort_groups
from quantkit.methods.grid import QuantizedWeight

__all__ = ["FORMATS", "Engine", "Format", "Plan", "encode", "format_of", "sort_groups"]

#: Name after `--format`, which is also `quant_method` in config.json -> format.
FORMATS: dict[str, Format] = {form.name: form for form in (COMPRESSED_TENSORS, GPTQ, AWQ)}


def encode(form: str, weight: QuantizedWeight, dtype: torch.dtype, where: str) -> dict[str, Tensor]:
    """Suffix -> tensor of a matrix of a model of `dtype` in format `form`.

    Raises:
        FormatError: the format cannot hold it; the message starts with `where`.
    """
    try:
        if problem := FORMATS[form].problem(weight.scheme, *weight.codes.shape):
            raise FormatError(problem)
        return FORMATS[form].encode(weight, dtype)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None


def format_of(config: Mapping[str, Any]) -> Format:
    """The format that a `quantization_config` names.

    Raises:
        FormatError: no reader for it.
    """
    method = config.get("quant_method")
    if str(method) not in FORMATS:
        raise FormatError(f"quant_method {method!r:.60} cannot be read; known: {', '.join(FORMATS)}")
    return FORMATS[str(method)]
