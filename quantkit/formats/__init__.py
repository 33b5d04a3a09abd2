"""On-disk formats: quantized weights <-> the tensors and configs that other engines load, in both directions.

A format is one file here that defines a `Format`, and one line of `FORMATS`. Reading the names in `FORMATS` imports no format,
and a format's own module imports torch only when it encodes or decodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import FormatError
from quantkit.formats.base import EngineSupport, Format, ModuleSchemes
from quantkit.utils.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.methods.grid import QuantizedWeight

__all__ = ["FORMATS", "EngineSupport", "Format", "ModuleSchemes", "encode", "format_of"]

#: Value of a recipe's `format` and of `--format`, and `quant_method` in config.json -> format.
FORMATS: Registry[Format] = Registry(
    "format",
    {
        "compressed-tensors": (
            "quantkit.formats.compressed_tensors:FORMAT",
            "pack-quantized; any scheme, mixed freely. vLLM, SGLang and transformers load it.",
        ),
        "gptq": ("quantkit.formats.gptq:FORMAT", "The AutoGPTQ / GPTQModel layout."),
        "awq": ("quantkit.formats.awq:FORMAT", "The AutoAWQ gemm layout; one 4-bit scheme for all matrices."),
    },
)


def encode(name: str, weight: QuantizedWeight, dtype: torch.dtype, where: str) -> dict[str, Tensor]:
    """Encode a matrix in the format of that name.

    Args:
        name: a name in `FORMATS`.
        weight: the matrix.
        dtype: the model's dtype.
        where: start of an error's message.

    Returns:
        suffix -> tensor.

    Raises:
        FormatError: the format cannot hold the matrix.
    """
    try:
        if reason := FORMATS[name].unsupported_reason(weight.scheme, *weight.codes.shape):
            raise FormatError(reason)
        return FORMATS[name].encode(weight, dtype)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None


def format_of(config: Mapping[str, Any]) -> Format:
    """The format that a `quantization_config` names.

    Raises:
        FormatError: no format of that name is registered.
    """
    method = config.get("quant_method")
    if str(method) not in FORMATS:
        raise FormatError(f"quant_method {method!r:.60} cannot be read; known: {', '.join(FORMATS)}")
    return FORMATS[str(method)]
