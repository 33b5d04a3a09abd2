"""Dense little-endian bit packing of small integers into int32 words.

Element k of a row occupies bits k*b .. k*b + b - 1 of the row's bitstream; word r holds bits 32r .. 32r + 31. For b = 3
values straddle words: 32 values fill exactly 3 words. All formats store a permutation of this stream.

Values of 2, 4 and 8 bits are packed byte by byte, which is about ten times faster. This relies on little-endian int32 words,
which every machine has that torch runs on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def words(count: int, bits: int) -> int:
    """Number of int32 words that hold `count` values of `bits` bits: ceil(count * bits / 32)."""
    return -(-count * bits // 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension.

    Args:
        values: integer [R, C], each in [0, 2^bits - 1].
        bits: 1 to 8.

    Returns:
        int32 [R, ceil(C * bits / 32)].
    """
    import torch

    rows, count = values.shape
    if 8 % bits == 0:
        fields = torch.zeros(rows, words(count, bits) * 4, 8 // bits, dtype=torch.uint8, device=values.device)
        fields.view(rows, -1)[:, :count] = values
        for position in range(1, 8 // bits):
            fields[..., 0] |= fields[..., position] << (position * bits)
        return fields[..., 0].contiguous().view(torch.int32)
    padded = torch.zeros(rows, -(-count // 32) * 32, dtype=torch.int64, device=values.device)
    padded[:, :count] = values
    lanes = padded.view(rows, -1, 32)
    out = torch.zeros(rows, lanes.shape[1], bits, dtype=torch.int64, device=values.device)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        shifted = lanes[:, :, lane] << shift
        out[:, :, word] |= shifted & 0xFFFFFFFF
        if shift + bits > 32:
            out[:, :, word + 1] |= shifted >> 32
    # int64 -> int32 keeps the low 32 bits, so words above 2^31 become negative as they should.
    return out.view(rows, -1)[:, : words(count, bits)].to(torch.int32).contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: int32 [R, ceil(count * bits / 32)] -> uint8 [R, count]. Values of 8 bits are a view."""
    import torch

    rows = packed.shape[0]
    if bits == 8:
        return packed.contiguous().view(torch.uint8)[:, :count].contiguous()
    if 8 % bits == 0:
        stored = packed.contiguous().view(torch.uint8)
        fields = torch.empty(*stored.shape, 8 // bits, dtype=torch.uint8, device=packed.device)
        for position in range(8 // bits):
            torch.bitwise_and(stored >> (position * bits), (1 << bits) - 1, out=fields[..., position])
        return fields.view(rows, -1)[:, :count].contiguous()
    lanes = -(-count // 32)
    padded = torch.zeros(rows, lanes * bits, dtype=torch.int64, device=packed.device)
    padded[:, : packed.shape[1]] = packed.to(torch.int64) & 0xFFFFFFFF
    stream = padded.view(rows, lanes, bits)
    out = torch.empty(rows, lanes, 32, dtype=torch.uint8, device=packed.device)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = stream[:, :, word] >> shift
        if shift + bits > 32:
            value = value | (stream[:, :, word + 1] << (32 - shift))
        out[:, :, lane] = value & ((1 << bits) - 1)
    return out.view(rows, -1)[:, :count].contiguous()
