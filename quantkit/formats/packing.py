"""Dense little-endian bit packing of small integers into int32 words.

Element k of a row occupies bits k*b .. k*b + b - 1 of the row's bitstream; word r holds bits 32r .. 32r + 31. For b = 3
values straddle words: 32 values fill exactly 3 words. All formats store permutations of this one stream.
"""

import torch
from torch import Tensor


def words(count: int, bits: int) -> int:
    """int32 words that hold `count` values of `bits` bits: ceil(count * bits / 32)."""
    return -(-count * bits // 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension.

    Args:
        values: integer [R, C], each in [0, 2^bits - 1].
        bits: 1 to 8.

    Returns:
        int32 [R, ceil(C * bits / 32)].
    """
    rows, count = values.shape
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
    """Inverse of `pack`: int32 [R, ceil(count * bits / 32)] -> uint8 [R, count]."""
    rows = packed.shape[0]
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
