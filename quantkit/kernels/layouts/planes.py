"""The layout of packed weights that all GPU kernels read.

Codes are divided along K into planes of 16 columns. A 16-bit word holds one column of each plane of a block. For 4 bits a
block is 4 planes, which is 64 columns, and word j (0..15) of block b holds column 64b + 16c + j in nibble c. So one mask
unpacks plane c of 16 words; each plane feeds one matrix instruction, which is 16 columns deep; and groups of 16, 32, 64 or 128
columns are whole planes. For 2 bits a block has 8 planes (128 columns), for 8 bits 2 planes (32 columns).

3-bit codes are stored as two arrays, in blocks of 256 columns: the low two bits like a 2-bit weight, and the third bits, where
field c (of two bits) of word j holds the third bits of columns 256b + 16c + j and 256b + 128 + 16c + j. So a third bit is at
the same position as the low bits of its column, and one shift serves both.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PLANE = 16


@dataclass(frozen=True)
class PlaneWeight:
    """A packed weight for `dequant_matmul` and `w4a8_matmul`.

    Attributes:
        words: int16 [N, K'/16 * bits], K' = K rounded up to whole blocks; padded with 0. For 3 bits, the low two bits
            [N, K'/16 * 2].
        high_bits: int16 [N, K'/16], the third bits, for 3 bits; else None.
        qparams: int32 [G, N]: the scale in the lower half, the zero point in the upper half, both as `scale_type`.
        scale_type: float16 or bfloat16.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale: a multiple of 16, or K if one group is the whole row.
        shape: (N, K).
    """

    words: Tensor
    high_bits: Tensor | None
    qparams: Tensor
    scale_type: torch.dtype
    bits: int
    group_size: int
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weight that a product reads."""
        return sum(part.nbytes for part in (self.words, self.high_bits, self.qparams) if part is not None)

    @property
    def scales(self) -> Tensor:
        """scale_type [G, N]."""
        return self.qparams.to(torch.int16).view(self.scale_type)

    @property
    def zeros(self) -> Tensor:
        """scale_type [G, N], whole numbers."""
        return (self.qparams >> 16).to(torch.int16).view(self.scale_type)

    def to(self, device: torch.device | str) -> "PlaneWeight":
        """A copy on another device."""
        high_bits = None if self.high_bits is None else self.high_bits.to(device)
        return replace(self, words=self.words.to(device), high_bits=high_bits, qparams=self.qparams.to(device))


def block_columns(bits: int) -> int:
    """Columns in a block."""
    return 256 if bits == 3 else 256 // bits


def fits(columns: int, group_size: int) -> bool:
    """Whether the layout supports groups of `group_size` columns (-1: one group per row) in rows of `columns`."""
    return group_size in (-1, columns) or (group_size % PLANE == 0 and columns % group_size == 0)


def to_planes(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, dtype: torch.dtype = torch.float16
) -> PlaneWeight:
    """Pack a quantized matrix.

    Args:
        codes: uint8 [N, K], below 2^bits.
        scales: floating [N, G].
        zeros: integer [N, G], within 0..255.
        bits: 2, 3, 4 or 8.
        group_size: columns per group, supported by `fits`.
        dtype: float16 or bfloat16, the type of the stored scales; the other one is used if only that holds them exactly.
    """
    rows, columns = codes.shape
    assert bits in (2, 3, 4, 8), bits
    assert fits(columns, group_size), (columns, group_size)
    width = columns if group_size == -1 else group_size
    assert scales.shape == zeros.shape == (rows, columns // width), (codes.shape, scales.shape, zeros.shape, width)
    padded = torch.nn.functional.pad(codes, (0, -columns % block_columns(bits)))
    high_bits = None
    if bits == 3:
        halves = (padded >> 2).view(rows, -1, 2, 128)
        high_bits = _pack((halves[:, :, 0] | halves[:, :, 1] << 1).flatten(1), 2)
    words = _pack(padded & 3, 2) if bits == 3 else _pack(padded, bits)
    stored = _lossless(scales, dtype)
    # A zero point has at most 8 significant bits, which both types hold exactly.
    qparams = stored.view(torch.int16).int() & 0xFFFF | zeros.to(stored.dtype).view(torch.int16).int() << 16
    return PlaneWeight(words, high_bits, qparams.T.contiguous(), stored.dtype, bits, width, (rows, columns))


def from_planes(weight: PlaneWeight) -> Tensor:
    """The codes of a packed weight, uint8 [N, K]."""
    if weight.high_bits is None:
        codes = _unpack(weight.words, weight.bits)
    else:
        halves = _unpack(weight.high_bits, 2).unflatten(1, (-1, 128))
        codes = _unpack(weight.words, 2) | torch.stack([halves & 1, halves >> 1], 2).flatten(1) << 2
    return codes[:, : weight.shape[1]].contiguous()


def _pack(fields: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, whole blocks] -> int16 words of 16 / bits fields."""
    planes = fields.unflatten(1, (-1, 16 // bits, PLANE))
    words = torch.zeros_like(planes[:, :, 0], dtype=torch.int32)
    for plane in range(16 // bits):
        words |= planes[:, :, plane].int() << bits * plane
    # Words above 32767 become negative numbers with the same bits.
    signed: Tensor = words - (words >> 15 << 16)
    return signed.to(torch.int16).flatten(1)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`."""
    blocks = words.int().unflatten(1, (-1, 1, PLANE))
    shifts = torch.arange(0, 16, bits, device=words.device)[:, None]
    fields: Tensor = blocks >> shifts & (1 << bits) - 1
    return fields.to(torch.uint8).flatten(1)


def _lossless(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`scales` in `dtype`, or in the other 16-bit type if that one is exact and `dtype` is not."""
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    stored = scales.to(dtype)
    exact = torch.equal(stored.float(), scales.float())
    return stored if exact or not torch.equal(scales.to(other).float(), scales.float()) else scales.to(other)
