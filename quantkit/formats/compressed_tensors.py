"""compressed-tensors `pack-quantized`: packed along K, scales in the model's dtype, zero points packed along N.

`weight_packed` is the transpose of GPTQ's `qweight`, `weight_zero_point` of its v2 `qzeros`.
"""

from __future__ import annotations

import re
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
    module_patterns,
    parse_scheme,
    unsupported_group_size,
)
from quantkit.formats.packing import pack, unpack, words
from quantkit.methods.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.methods.grid import QuantizedWeight

#: Field that says that more than the weights is quantized -> endings of the tensors for that.
_EXTRA_QUANTIZATION = {
    "input_activations": (".input_scale", ".input_zero_point"),
    "output_activations": (".output_scale", ".output_zero_point"),
    "kv_cache_scheme": (".k_scale", ".k_zero_point", ".v_scale", ".v_zero_point"),
}


def _encode(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    import torch

    bits = weight.scheme.bits
    tensors = {
        "weight_packed": pack(weight.codes, bits),
        "weight_scale": cast_exactly(weight.scales, dtype),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if not weight.scheme.symmetric:
        tensors["weight_zero_point"] = pack(weight.zeros.T, bits).T.contiguous()
    return tensors


def _decode(tensors: Mapping[str, Tensor], scheme: Scheme, _config: Mapping[str, Any]) -> QuantizedWeight:
    import torch

    from quantkit.methods.grid import QuantizedWeight

    bits = scheme.bits
    rows, columns = _dense_shape(tuple(tensors["weight_packed"].shape), bits)
    if "weight_shape" in tensors:
        if tensors["weight_shape"].shape != (2,) or tensors["weight_shape"].is_floating_point():
            raise FormatError("weight_shape is not [N, K]; fetch the model again")
        rows, columns = tensors["weight_shape"].tolist()
    packed = checked_tensor(tensors, "weight_packed", (rows, words(columns, bits)))
    groups = count_groups(scheme, columns)
    scales = checked_tensor(tensors, "weight_scale", (rows, groups), floating=True).float()
    if scheme.symmetric:
        zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
    else:
        stored = checked_tensor(tensors, "weight_zero_point", (words(rows, bits), groups))
        zeros = unpack(stored.T.contiguous(), bits, rows).T.contiguous()
    return QuantizedWeight(unpack(packed, bits, columns), scales, zeros, scheme)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
    if scheme.group_size == -1:
        weights |= {"strategy": "channel", "group_size": None}
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _config(schemes: ModuleSchemes) -> dict[str, Any]:
    used = list(dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None))
    groups = {}
    for number, scheme in enumerate(used):
        modules = [name for name, own in schemes.items() if own == scheme]
        targets = ["Linear"] if len(used) == 1 else [f"re:{pattern}" for pattern in module_patterns(modules, schemes)]
        groups[f"group_{number}"] = _group(scheme, targets)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, own in schemes.items() if own is None],
        "kv_cache_scheme": None,
    }


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)


def _scheme(weights: Mapping[str, Any]) -> Scheme:
    """The scheme that a group's `weights` state.

    Raises:
        FormatError: they are not integers with one scale per group or row, with groups in the order of the columns.
    """
    kind, strategy, order = weights.get("type", "int"), weights.get("strategy"), weights.get("actorder")
    if kind != "int" or strategy not in ("group", "channel") or order not in (None, "static", "weight"):
        found = f"type {kind!r:.20}, strategy {strategy!r:.20}, actorder {order!r:.20}"
        raise FormatError(f"weights with {found} cannot be read; only int, group or channel, static")
    size = -1 if strategy == "channel" else weights["group_size"]
    return parse_scheme(weights["num_bits"], size, weights.get("symmetric", True))


def _schemes(config: Mapping[str, Any], modules: list[str]) -> dict[str, Scheme | None]:
    if config.get("format") != "pack-quantized":
        raise FormatError(f"compressed-tensors format {config.get('format')!r:.60} is not read; only pack-quantized")
    asked = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    # Precedence as in compressed-tensors: names, then patterns, then the class; within each in alphabetical order.
    ranked = sorted(asked, key=lambda target: (target == "Linear", target.startswith("re:"), target))
    schemes: dict[str, Scheme | None] = {}
    for module in modules:
        skipped = any(_matches(target, module) for target in config.get("ignore") or [])
        target = next((target for target in ranked if not skipped and _matches(target, module)), None)
        schemes[module] = None if target is None else _scheme(asked[target]["weights"])
    return schemes


def _extra_quantization(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    sections = [config, *config["config_groups"].values()]
    return {field: endings for field, endings in _EXTRA_QUANTIZATION.items() if any(each.get(field) for each in sections)}


def _unsupported_reason(scheme: Scheme, _rows: int, columns: int) -> str | None:
    return unsupported_group_size(scheme, columns)


def _engines(used: set[Scheme]) -> list[EngineSupport]:
    served = all(scheme.bits in (4, 8) for scheme in used)
    symmetric = all(scheme.symmetric for scheme in used)
    # transformers reads zero points only when it dequantizes, and then applies the first group's scheme to all matrices.
    readable = symmetric or len(used) == 1
    how = "" if symmetric else "with CompressedTensorsConfig(dequantize=True)" if readable else "needs one scheme or symmetric"
    marlin = all(
        scheme.group_size in (-1, 32, 64, 128) and (scheme.bits == 4 or (scheme.bits == 8 and scheme.symmetric))
        for scheme in used
    )
    return [
        EngineSupport("vLLM", True, "" if marlin else "without Marlin kernels"),
        EngineSupport("SGLang", served, "" if served else "needs 4 or 8 bits"),
        EngineSupport("transformers", readable, how),
    ]


def _dense_shape(stored: tuple[int, ...], bits: int) -> tuple[int, int]:
    rows, packed_columns = stored
    return rows, packed_columns * 32 // bits


def _stored_bytes(scheme: Scheme, rows: int, columns: int, itemsize: int) -> int:
    groups = scheme.groups(columns)
    zeros = 0 if scheme.symmetric else groups * words(rows, scheme.bits)
    shape = 16
    return 4 * (rows * words(columns, scheme.bits) + zeros) + rows * groups * itemsize + shape


FORMAT = Format(
    name="compressed-tensors",
    suffixes=("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    encode=_encode,
    decode=_decode,
    config=_config,
    schemes=_schemes,
    unsupported_reason=_unsupported_reason,
    engines=_engines,
    dense_shape=_dense_shape,
    stored_bytes=_stored_bytes,
    packed_rows=lambda scheme: not scheme.symmetric,  # zero points
    packed_columns=lambda _scheme: True,
    # SGLang takes the head for a dense one and generates nonsense (pull request 34904).
    quantized_head={
        "vLLM": "its output head is quantized, which vLLM reads in compressed-tensors since pull request 37291 (2026)"
    },
    metadata_suffixes=("weight_shape",),
    holds_transform=True,
    extra_quantization=_extra_quantization,
)
