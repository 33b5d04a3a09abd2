"""compressed-tensors `pack-quantized`: packed along K, scales in the model's dtype, zero points packed along N.

`weight_packed` is the transpose of GPTQ's `qweight`, `weight_zero_point` of its v2 `qzeros`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats.base import Engine, Format, Plan, exact, group_problem, patterns
from quantkit.formats.packing import pack, unpack, words
from quantkit.methods.grid import QuantizedWeight, Scheme


def _encode(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    bits = weight.scheme.bits
    tensors = {
        "weight_packed": pack(weight.codes, bits),
        "weight_scale": exact(weight.scales, dtype),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if not weight.scheme.symmetric:
        tensors["weight_zero_point"] = pack(weight.zeros.T, bits).T.contiguous()
    return tensors


def _decode(tensors: Mapping[str, Tensor], scheme: Scheme, _config: Mapping[str, Any]) -> QuantizedWeight:
    packed, scales = tensors["weight_packed"], tensors["weight_scale"].float()
    rows = packed.shape[0]
    columns = int(tensors["weight_shape"][1]) if "weight_shape" in tensors else packed.shape[1] * 32 // scheme.bits
    if packed.shape[1] != words(columns, scheme.bits) or scales.shape != (rows, scheme.groups(columns)):
        raise FormatError(f"weight_packed {tuple(packed.shape)} and weight_scale {tuple(scales.shape)} disagree with {scheme}")
    if scheme.symmetric:
        zeros = torch.full(scales.shape, 1 << (scheme.bits - 1), dtype=torch.uint8)
    else:
        zeros = unpack(tensors["weight_zero_point"].T.contiguous(), scheme.bits, rows).T.contiguous()
    return QuantizedWeight(unpack(packed, scheme.bits, columns), scales, zeros, scheme)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
    if scheme.group_size == -1:
        weights |= {"strategy": "channel", "group_size": None}
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _config(plan: Plan) -> dict[str, Any]:
    used = list(dict.fromkeys(scheme for scheme in plan.values() if scheme is not None))
    groups = {}
    for number, scheme in enumerate(used):
        modules = [name for name, own in plan.items() if own == scheme]
        targets = ["Linear"] if len(used) == 1 else [f"re:{pattern}" for pattern in patterns(modules, plan)]
        groups[f"group_{number}"] = _group(scheme, targets)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, own in plan.items() if own is None],
        "kv_cache_scheme": None,
    }


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)


def _schemes(config: Mapping[str, Any], modules: list[str]) -> dict[str, Scheme | None]:
    if config.get("format") != "pack-quantized":
        raise FormatError(f"compressed-tensors format '{config.get('format')}' is not read; only pack-quantized")
    plan: dict[str, Scheme | None] = {}
    for module in modules:
        plan[module] = None
        if any(_matches(target, module) for target in config.get("ignore") or []):
            continue
        for group in config["config_groups"].values():
            if any(_matches(target, module) for target in group["targets"]):
                weights = group["weights"]
                size = -1 if weights.get("strategy") == "channel" else int(weights["group_size"])
                plan[module] = Scheme(int(weights["num_bits"]), size, bool(weights["symmetric"]))
    return plan


def _problem(scheme: Scheme, _rows: int, columns: int) -> str | None:
    return group_problem(scheme, columns)


def _engines(used: set[Scheme]) -> list[Engine]:
    served = all(scheme.bits in (4, 8) for scheme in used)
    symmetric = all(scheme.symmetric for scheme in used)
    marlin = all(
        scheme.group_size in (-1, 32, 64, 128) and (scheme.bits == 4 or (scheme.bits == 8 and scheme.symmetric))
        for scheme in used
    )
    return [
        Engine("vLLM", True, "" if marlin else "without Marlin kernels"),
        Engine("SGLang", served, "" if served else "needs 4 or 8 bits"),
        Engine("transformers", True, "" if symmetric else "with CompressedTensorsConfig(dequantize=True)"),
    ]


def _dense_shape(stored: tuple[int, ...], bits: int) -> tuple[int, int]:
    return stored[0], stored[1] * 32 // bits


COMPRESSED_TENSORS = Format(
    "compressed-tensors",
    ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    _encode,
    _decode,
    _config,
    _schemes,
    _problem,
    _engines,
    _dense_shape,
)
