"""The three layouts of formats.md once more: slow, over Python ints, sharing nothing with the package but its data types.

Tensors come and go as nested lists, so that no dtype or stride can agree by accident.
"""

from typing import Any

import torch
from hypothesis import HealthCheck, settings

from quantkit.methods.grid import QuantizedWeight, storable_scales
from quantkit.methods.scheme import Scheme

Table = list[list[Any]]

#: For properties: no example is timed, on machines that others use too.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def signed(word: int) -> int:
    """32 bits as an int32 shows them."""
    return word - (1 << 32) if word >> 31 else word


def bitstream(values: list[int], bits: int) -> list[int]:
    """Element k at bit k * bits of a little-endian stream, cut into int32 words."""
    stream = sum(value << (k * bits) for k, value in enumerate(values))
    return [signed((stream >> (32 * r)) & 0xFFFFFFFF) for r in range(-(-len(values) * bits // 32))]


def transposed(table: Table) -> Table:
    return [list(column) for column in zip(*table, strict=True)]


def gptq(weight: QuantizedWeight, *, version: int) -> dict[str, Any]:
    """qweight along K, qzeros along N (z - 1 in version 1), scales [G, N], g_idx = k // g."""
    bits, size = weight.scheme.bits, weight.scheme.group_size
    codes, zeros = weight.codes.tolist(), weight.zeros.tolist()
    columns = len(codes[0])
    stored = [[z - 1 if version == 1 else z for z in column] for column in transposed(zeros)]
    return {
        "qweight": transposed([bitstream(row, bits) for row in codes]),
        "qzeros": [bitstream(column, bits) for column in stored],
        "scales": transposed(weight.scales.tolist()),
        "g_idx": [k // (columns if size == -1 else size) for k in range(columns)],
    }


def awq(weight: QuantizedWeight) -> dict[str, Any]:
    """Nibble j of word c is column 8c + AWQ_ORDER[j], for qweight [K, N/8] and qzeros [G, N/8]."""

    def words(by_row: Table) -> Table:
        table = []
        for line in transposed(by_row):
            eights = [line[start : start + 8] for start in range(0, len(line), 8)]
            table.append([signed(sum(eight[AWQ_ORDER[j]] << (4 * j) for j in range(8))) for eight in eights])
        return table

    return {
        "qweight": words(weight.codes.tolist()),
        "qzeros": words(weight.zeros.tolist()),
        "scales": transposed(weight.scales.tolist()),
    }


def compressed_tensors(weight: QuantizedWeight) -> dict[str, Any]:
    """weight_packed along K, weight_zero_point along N (asymmetric only), weight_scale [N, G], weight_shape [N, K]."""
    bits, codes = weight.scheme.bits, weight.codes.tolist()
    tensors: dict[str, Any] = {
        "weight_packed": [bitstream(row, bits) for row in codes],
        "weight_scale": weight.scales.tolist(),
        "weight_shape": [len(codes), len(codes[0])],
    }
    if not weight.scheme.symmetric:
        by_group = transposed(weight.zeros.tolist())
        tensors["weight_zero_point"] = transposed([bitstream(column, bits) for column in by_group])
    return tensors


def make_weight(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    """Random codes, zero points over the whole range and scales of both signs.

    The first row holds the largest codes and so sets the top bit of all its words; the second one holds zeros.
    """
    random = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    codes = torch.randint(0, scheme.levels + 1, (rows, columns), generator=random, dtype=torch.uint8)
    codes[0], codes[1:2] = scheme.levels, 0
    zeros = torch.randint(0, scheme.levels + 1, (rows, groups), generator=random, dtype=torch.uint8)
    zeros[0], zeros[1:2] = scheme.levels, 0
    if scheme.symmetric:
        zeros.fill_(1 << (scheme.bits - 1))
    scales = storable_scales(torch.randn(rows, groups, generator=random), torch.bfloat16)
    return QuantizedWeight(codes, scales, zeros, scheme)
