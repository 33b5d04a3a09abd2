"""GPTQ: `qweight` packed along K, `qzeros` along N, float16 scales (the AutoGPTQ / GPTQModel layout).

v1 (`checkpoint_format: gptq`) stores z - 1, which underflows at z = 0; so symmetric weights, whose z is fixed above 0, are
written as v1, which every engine reads, and asymmetric ones as v2 (`gptq_v2`), which stores z itself.
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


def _encode(weight: QuantizedWeight, _dtype: torch.dtype) -> dict[str, Tensor]:
    bits, columns = weight.scheme.bits, weight.codes.shape[1]
    stored_zeros = weight.zeros - 1 if weight.scheme.symmetric else weight.zeros
    return {
        "qweight": pack(weight.codes, bits).T.contiguous(),
        "qzeros": pack(stored_zeros.T, bits),
        "scales": exact(weight.scales, torch.float16).T.contiguous(),
        "g_idx": (torch.arange(columns) // weight.scheme.group_columns(columns)).to(torch.int32),
    }


def _decode(tensors: Mapping[str, Tensor], scheme: Scheme, config: Mapping[str, Any]) -> QuantizedWeight:
    qweight, scales = tensors["qweight"], tensors["scales"].float()
    groups, rows = scales.shape
    columns = qweight.shape[0] * 32 // scheme.bits
    if "g_idx" in tensors and not torch.equal(tensors["g_idx"].long(), torch.arange(columns) // scheme.group_columns(columns)):
        raise FormatError("g_idx is permuted (desc_act with dynamic groups), which has no plain grid")
    if qweight.shape[1] != rows or groups != scheme.groups(columns):
        raise FormatError(f"qweight {tuple(qweight.shape)} and scales {tuple(scales.shape)} disagree with {scheme}")
    zeros = unpack(tensors["qzeros"], scheme.bits, rows).T
    if config.get("checkpoint_format", "gptq") == "gptq":
        zeros = zeros + 1
    codes = unpack(qweight.T.contiguous(), scheme.bits, columns)
    return QuantizedWeight(codes, scales.T.contiguous(), zeros.contiguous(), scheme)


def _rule(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def _config(plan: Plan) -> dict[str, Any]:
    used = [scheme for scheme in plan.values() if scheme is not None]
    main = max(dict.fromkeys(used), key=used.count)
    if len({scheme.symmetric for scheme in used}) > 1:
        raise FormatError("the gptq format cannot mix symmetric and asymmetric matrices; use compressed-tensors")
    dynamic: dict[str, Any] = {}
    for scheme in dict.fromkeys(plan.values()):
        modules = [name for name, own in plan.items() if own == scheme]
        if scheme is None:
            dynamic.update({f"-:{p}": {} for p in patterns([m for m in modules if m != "lm_head"], plan)})
        elif scheme != main:
            dynamic.update({f"+:{p}": _rule(scheme) for p in patterns(modules, plan)})
    config = {
        "quant_method": "gptq",
        **_rule(main),
        "desc_act": False,
        "lm_head": plan.get("lm_head") is not None,
        "checkpoint_format": "gptq" if main.symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["quantkit:0.1.0"]},
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def _schemes(config: Mapping[str, Any], modules: list[str]) -> dict[str, Scheme | None]:
    main = Scheme(int(config["bits"]), int(config["group_size"]), bool(config.get("sym", True)))
    plan: dict[str, Scheme | None] = {}
    for module in modules:
        plan[module] = None if module == "lm_head" and not config.get("lm_head") else main
        for pattern, rule in (config.get("dynamic") or {}).items():
            if re.match(pattern[2:], module):
                plan[module] = None
                if not pattern.startswith("-:"):
                    asked = _rule(main) | rule
                    plan[module] = Scheme(asked["bits"], asked["group_size"], asked["sym"])
                break
    return plan


def _problem(scheme: Scheme, rows: int, columns: int) -> str | None:
    if rows * scheme.bits % 32 or columns * scheme.bits % 32:
        return f"the gptq format packs whole 32-bit words, {rows} x {columns} at {scheme.bits} bits does not fill them"
    assert words(rows, scheme.bits) * 32 == rows * scheme.bits
    return group_problem(scheme, columns)


def _engines(used: set[Scheme]) -> list[Engine]:
    plain = all(scheme.symmetric and scheme.bits in (4, 8) for scheme in used)
    need = "" if plain else "needs 4 or 8 bits, symmetric"
    return [Engine("vLLM", plain, need), Engine("SGLang", plain, need), Engine("transformers", True, "with gptqmodel")]


def _dense_shape(stored: tuple[int, ...], bits: int) -> tuple[int, int]:
    return stored[1], stored[0] * 32 // bits


GPTQ = Format(
    "gptq", ("qweight", "qzeros", "scales", "g_idx"), _encode, _decode, _config, _schemes, _problem, _engines, _dense_shape
)
