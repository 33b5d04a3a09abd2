"""AWQ gemm: 4 bits only, packed along N in the order 0 2 4 6 1 3 5 7, float16 scales (the AutoAWQ layout)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import FormatError
from quantkit.formats.base import (
    EngineSupport,
    Format,
    ModuleSchemes,
    cast_exactly,
    checked_tensor,
    count_groups,
    parse_scheme,
    unsupported_group_size,
)
from quantkit.formats.packing import pack, unpack, words
from quantkit.methods.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.methods.grid import QuantizedWeight

#: Nibble j of a word holds column 8c + ORDER[j].
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _interleave(values: Tensor) -> Tensor:
    """Put every run of eight columns of [R, C] into AWQ's order."""
    return values.view(values.shape[0], -1, 8)[:, :, list(ORDER)].reshape(values.shape)


def _restore(values: Tensor) -> Tensor:
    """Inverse of `_interleave`."""
    inverse = [ORDER.index(j) for j in range(8)]
    return values.view(values.shape[0], -1, 8)[:, :, inverse].reshape(values.shape)


def _encode(weight: QuantizedWeight, _dtype: torch.dtype) -> dict[str, Tensor]:
    import torch

    return {
        "qweight": pack(_interleave(weight.codes.T.contiguous()), 4),
        "qzeros": pack(_interleave(weight.zeros.T.contiguous()), 4),
        "scales": cast_exactly(weight.scales, torch.float16).T.contiguous(),
    }


def _decode(tensors: Mapping[str, Tensor], scheme: Scheme, _config: Mapping[str, Any]) -> QuantizedWeight:
    from quantkit.methods.grid import QuantizedWeight

    columns, packed_rows = tensors["qweight"].shape
    rows = packed_rows * 8
    groups = count_groups(scheme, columns)
    codes = _restore(unpack(tensors["qweight"], 4, rows)).T.contiguous()
    zeros = _restore(unpack(checked_tensor(tensors, "qzeros", (groups, packed_rows)), 4, rows)).T.contiguous()
    scales = checked_tensor(tensors, "scales", (groups, rows), floating=True).float().T.contiguous()
    return QuantizedWeight(codes, scales, zeros, scheme)


def _config(schemes: ModuleSchemes) -> dict[str, Any]:
    used = {scheme for scheme in schemes.values() if scheme is not None}
    if len(used) != 1:
        raise FormatError("the awq format holds one scheme for all matrices; use compressed-tensors for mixed ones")
    (scheme,) = used
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [name for name, own in schemes.items() if own is None],
    }


def _schemes(config: Mapping[str, Any], modules: list[str]) -> dict[str, Scheme | None]:
    if str(config.get("version", "gemm")).lower() != "gemm" or config.get("bits", 4) != 4:
        raise FormatError("only the 4-bit gemm version of the awq format can be read")
    scheme = parse_scheme(4, config["group_size"], False)
    skipped = config.get("modules_to_not_convert") or []
    return {name: None if any(skip in name for skip in skipped) else scheme for name in modules}


def _unsupported_reason(scheme: Scheme, rows: int, columns: int) -> str | None:
    if scheme.bits != 4:
        return f"the awq format holds 4 bits, not {scheme.bits}; use compressed-tensors"
    if rows % 8:
        return f"the awq format packs 8 rows to a word, {rows} is not a multiple of 8; use compressed-tensors"
    return unsupported_group_size(scheme, columns)


def _engines(_used: set[Scheme]) -> list[EngineSupport]:
    return [
        EngineSupport("vLLM", True),
        EngineSupport("SGLang", False, "loads this format for mixture-of-experts models only"),
        EngineSupport("transformers", True, "with gptqmodel"),
    ]


def _dense_shape(stored: tuple[int, ...], bits: int) -> tuple[int, int]:
    return stored[1] * 32 // bits, stored[0]


def _stored_bytes(scheme: Scheme, rows: int, columns: int, _itemsize: int) -> int:
    groups = scheme.groups(columns)
    return 4 * (columns + groups) * words(rows, 4) + 2 * rows * groups


FORMAT = Format(
    name="awq",
    suffixes=("qweight", "qzeros", "scales"),
    encode=_encode,
    decode=_decode,
    config=_config,
    schemes=_schemes,
    unsupported_reason=_unsupported_reason,
    engines=_engines,
    dense_shape=_dense_shape,
    stored_bytes=_stored_bytes,
    packed_rows=lambda _scheme: True,
    packed_columns=lambda _scheme: False,
)
