"""GPTQ: `qweight` packed along K, `qzeros` along N, float16 scales (the AutoGPTQ / GPTQModel layout).

v1 (`checkpoint_format: gptq`) stores z - 1, which underflows at z = 0. v2 (`gptq_v2`) stores z itself. Symmetric weights,
whose z is always above 0, are written as v1, which every engine reads; asymmetric weights are written as v2.
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

#: Name of a fused matrix in vLLM and SGLang -> the matrices that it consists of.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def _encode(weight: QuantizedWeight, _dtype: torch.dtype) -> dict[str, Tensor]:
    import torch

    bits, columns = weight.scheme.bits, weight.codes.shape[1]
    stored_zeros = weight.zeros - 1 if weight.scheme.symmetric else weight.zeros
    return {
        "qweight": pack(weight.codes, bits).T.contiguous(),
        "qzeros": pack(stored_zeros.T, bits),
        "scales": cast_exactly(weight.scales, torch.float16).T.contiguous(),
        "g_idx": _group_index(weight.scheme, columns),
    }


def _decode(tensors: Mapping[str, Tensor], scheme: Scheme, config: Mapping[str, Any]) -> QuantizedWeight:
    import torch

    from quantkit.methods.grid import QuantizedWeight

    bits, half = scheme.bits, 1 << (scheme.bits - 1)
    rows, columns = _dense_shape(tuple(tensors["qweight"].shape), bits)
    groups = count_groups(scheme, columns)
    if "g_idx" in tensors and not torch.equal(checked_tensor(tensors, "g_idx", (columns,)), _group_index(scheme, columns)):
        raise FormatError(
            "g_idx is permuted (desc_act with dynamic groups), which other formats cannot hold; quantize the original "
            "again with static groups or desc_act off"
        )
    scales = checked_tensor(tensors, "scales", (groups, rows), floating=True).float().T.contiguous()
    zeros = torch.full((rows, groups), half, dtype=torch.uint8)
    if "qzeros" in tensors or not scheme.symmetric:
        zeros = _zeros(checked_tensor(tensors, "qzeros", (groups, words(rows, bits))), bits, rows, config).T.contiguous()
    if scheme.symmetric and bool((zeros != half).any()):
        raise FormatError(f"config.json says symmetric, but not all zero points are {half}; fetch the model again")
    codes = unpack(tensors["qweight"].T.contiguous(), bits, columns)
    return QuantizedWeight(codes, scales, zeros, scheme)


def sort_groups(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[dict[str, Tensor], Tensor | None]:
    """Sort the columns of a matrix by group. Only desc_act with dynamic groups leaves them in another order.

    Args:
        tensors: suffix -> tensor of a matrix.
        scheme: bits and group size of the matrix.

    Returns:
        The tensors of the sorted matrix, and int64 [K], the column of the input that each of its columns multiplies; or the
        unchanged tensors and None if the columns are in order.

    Raises:
        FormatError: `g_idx` does not fill every group with group_size columns.
    """
    import torch

    if "g_idx" not in tensors:
        return dict(tensors), None
    _, columns = _dense_shape(tuple(tensors["qweight"].shape), scheme.bits)
    plain, found = _group_index(scheme, columns), checked_tensor(tensors, "g_idx", (columns,))
    if torch.equal(found, plain):
        return dict(tensors), None
    order = torch.argsort(found, stable=True)
    if not torch.equal(found[order], plain):
        raise FormatError(
            f"g_idx does not put {scheme.group_columns(columns)} columns into every group; fetch the model again"
        )
    codes = unpack(tensors["qweight"].T.contiguous(), scheme.bits, columns)
    qweight = pack(codes[:, order], scheme.bits).T.contiguous()
    return {suffix: t for suffix, t in tensors.items() if suffix != "g_idx"} | {"qweight": qweight}, order


def _group_index(scheme: Scheme, columns: int) -> Tensor:
    """Group of every column, int32 [K]."""
    import torch

    return (torch.arange(columns) // scheme.group_columns(columns)).int()


def _zeros(qzeros: Tensor, bits: int, rows: int, config: Mapping[str, Any]) -> Tensor:
    """Zero points of either version, uint8 [G, N].

    If z is 0, the z - 1 of v1 underflows, and no specification says what is stored then. We follow GPTQModel, the only tool
    that still writes and reads asymmetric v1: it subtracts 1 from all fields of a word at once, so that an underflow borrows
    from the next field. At 3 bits, whose fields straddle words, each field wraps.
    """
    import torch

    if config.get("checkpoint_format", "gptq") == "gptq_v2":
        return unpack(qzeros, bits, rows)
    if bits == 3:
        return (unpack(qzeros, bits, rows) + 1) & 0b111
    return unpack(qzeros + pack(torch.ones(1, rows, dtype=torch.uint8), bits), bits, rows)


def _rule(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def _fused_schemes(schemes: ModuleSchemes) -> dict[str, Scheme | None]:
    """The schemes under the names that vLLM and SGLang look up for fused matrices, where all parts have the same scheme."""
    merged: dict[str, Scheme | None] = {}
    for name, scheme in schemes.items():
        for fused, members in _FUSED.items():
            if name.endswith("." + members[0]):
                prefix = name.removesuffix(members[0])
                if all(schemes.get(prefix + member, scheme) == scheme for member in members):
                    merged[prefix + fused] = scheme
    return merged


def _config(schemes: ModuleSchemes) -> dict[str, Any]:
    used = [scheme for scheme in schemes.values() if scheme is not None]
    main = max(dict.fromkeys(used), key=used.count)
    if len({scheme.symmetric for scheme in used}) > 1:
        raise FormatError("the gptq format cannot mix symmetric and asymmetric matrices; use compressed-tensors")
    dynamic: dict[str, Any] = {}
    named = {**schemes, **_fused_schemes(schemes)}
    for scheme in dict.fromkeys(schemes.values()):
        modules = [name for name, own in named.items() if own == scheme]
        if scheme is None:
            dynamic.update({f"-:{p}": {} for p in module_patterns([m for m in modules if m != "lm_head"], named)})
        elif scheme != main:
            dynamic.update({f"+:{p}": _rule(scheme) for p in module_patterns(modules, named)})
    config = {
        "quant_method": "gptq",
        **_rule(main),
        "desc_act": False,
        "lm_head": schemes.get("lm_head") is not None,
        "checkpoint_format": "gptq" if main.symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["quantkit:0.1.0"]},
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def _schemes(config: Mapping[str, Any], modules: list[str]) -> dict[str, Scheme | None]:
    if config.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        raise FormatError(f"checkpoint_format {config['checkpoint_format']!r:.60} is not read; only gptq and gptq_v2")
    main = parse_scheme(config["bits"], config["group_size"], config.get("sym", True))
    schemes: dict[str, Scheme | None] = {}
    for module in modules:
        schemes[module] = None if module == "lm_head" and not config.get("lm_head") else main
        for pattern, rule in (config.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
                asked = _rule(main) | rule
                skipped = pattern.startswith("-:")
                schemes[module] = None if skipped else parse_scheme(asked["bits"], asked["group_size"], asked["sym"])
                break
    return schemes


def _unsupported_reason(scheme: Scheme, rows: int, columns: int) -> str | None:
    unit = 32 if scheme.bits == 3 else 32 // scheme.bits
    if rows % unit or columns % unit:
        return (
            f"the gptq format packs whole words, and {rows} x {columns} is not a multiple of {unit} both ways; "
            "use compressed-tensors"
        )
    return unsupported_group_size(scheme, columns)


def _engines(used: set[Scheme]) -> list[EngineSupport]:
    plain = all(scheme.symmetric and scheme.bits in (4, 8) for scheme in used)
    need = "" if plain else "needs 4 or 8 bits, symmetric"
    return [
        EngineSupport("vLLM", plain, need),
        EngineSupport("SGLang", plain, need),
        EngineSupport("transformers", True, "with gptqmodel"),
    ]


def _dense_shape(stored: tuple[int, ...], bits: int) -> tuple[int, int]:
    packed_columns, rows = stored
    return rows, packed_columns * 32 // bits


def _stored_bytes(scheme: Scheme, rows: int, columns: int, _itemsize: int) -> int:
    groups = scheme.groups(columns)
    packed = words(columns, scheme.bits) * rows + groups * words(rows, scheme.bits)
    group_index = columns
    return 4 * (packed + group_index) + 2 * rows * groups


FORMAT = Format(
    name="gptq",
    suffixes=("qweight", "qzeros", "scales", "g_idx"),
    encode=_encode,
    decode=_decode,
    config=_config,
    schemes=_schemes,
    unsupported_reason=_unsupported_reason,
    engines=_engines,
    dense_shape=_dense_shape,
    stored_bytes=_stored_bytes,
    packed_rows=lambda _scheme: True,  # zero points
    packed_columns=lambda _scheme: True,
    quantized_head={"vLLM": "", "SGLang": ""},
    metadata_suffixes=("g_idx",),
    extra_config_files=("quantize_config.json",),
    sort_groups=sort_groups,
)
