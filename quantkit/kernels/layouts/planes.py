"""The one layout of quantized weights that the GPU kernels read.

Codes are cut along K into planes of 16 columns. A word of 16 bits holds one column of every plane of a block: for 4 bits a
block is 4 planes, 64 columns, and word j (0..15) of block b holds column 64b + 16c + j in nibble c. So unpacking plane c of
16 words is one mask for all of them, every plane feeds a matrix instruction 16 columns deep, and groups of 16, 32, 64, 128
columns are whole planes. 2 bits make 8 planes (blocks of 128 columns), 8 bits 2 planes (32).

3 bits are two streams: the low two bits as a 2-bit weight, and the third bits, in blocks of 256 columns: field c (of two
bits) of word j holds the third bit of columns 256b + 16c + j and 256b + 128 + 16c + j. A third bit thus stands where the
low bits of its column stand, and one shift serves both.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PLANE = 16


@dataclass(frozen=True)
class PlaneWeight:
    """A quantized matrix, ready for `dequant_matmul`.

    Attributes:
        words: int16 [N, K'/16 * bits] (3 bits: of the low two), K' = K rounded up to whole blocks; the padding is 0.
        third: int16 [N, K'/16], the third bits where there are 3; else None.
        grids: int32 [G, N]: the scale in the lower half, the zero point in the upper, both as `scale_type`.
        scale_type: float16 or bfloat16.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, a multiple of 16, or K where one group is the whole row.
        shape: (N, K).
    """

    words: Tensor
    third: Tensor | None
    grids: Tensor
    scale_type: torch.dtype
    bits: int
    group_size: int
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Bytes that a multiplication reads."""
        return sum(part.nbytes for part in (self.words, self.third, self.grids) if part is not None)

    @property
    def scales(self) -> Tensor:
        """scale_type [G, N]."""
        return self.grids.to(torch.int16).view(self.scale_type)

    @property
    def zeros(self) -> Tensor:
        """scale_type [G, N], whole numbers."""
        return (self.grids >> 16).to(torch.int16).view(self.scale_type)

    def to(self, device: torch.device | str) -> "PlaneWeight":
        """The same on another device."""
        third = None if self.third is None else self.third.to(device)
        return replace(self, words=self.words.to(device), third=third, grids=self.grids.to(device))


def block_columns(bits: int) -> int:
    """Columns in a block."""
    return 256 if bits == 3 else 256 // bits


def fits(columns: int, group_size: int) -> bool:
    """Whether the layout can hold groups of that many columns (-1: one group) in a row of `columns`."""
    return group_size in (-1, columns) or (group_size % PLANE == 0 and columns % group_size == 0)


def to_planes(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, dtype: torch.dtype = torch.float16
) -> PlaneWeight:
    """Lay out a quantized matrix.

    Args:
        codes: uint8 [N, K], below 2^bits.
        scales: floating [N, G].
        zeros: integer [N, G], within 0..255.
        group_size: see `fits`, which must hold.
        dtype: float16 or bfloat16, in which scales are stored; the other one if only that holds them exactly.
    """
    rows, columns = codes.shape
    assert bits in (2, 3, 4, 8), bits
    assert fits(columns, group_size), (columns, group_size)
    width = columns if group_size == -1 else group_size
    assert scales.shape == zeros.shape == (rows, columns // width), (codes.shape, scales.shape, zeros.shape, width)
    padded = torch.nn.functional.pad(codes, (0, -columns % block_columns(bits)))
    third = None
    if bits == 3:
        halves = (padded >> 2).view(rows, -1, 2, 128)
        third = _pack((halves[:, :, 0] | halves[:, :, 1] << 1).flatten(1), 2)
    words = _pack(padded & 3, 2) if bits == 3 else _pack(padded, bits)
    stored = _lossless(scales, dtype)
    # 8 significant bits hold every zero point exactly.
    grids = stored.view(torch.int16).int() & 0xFFFF | zeros.to(stored.dtype).view(torch.int16).int() << 16
    return PlaneWeight(words, third, grids.T.contiguous(), stored.dtype, bits, width, (rows, columns))


def from_planes(weight: PlaneWeight) -> Tensor:
    """The codes, uint8 [N, K]."""
    if weight.third is None:
        codes = _unpack(weight.words, weight.bits)
    else:
        halves = _unpack(weight.third, 2).unflatten(1, (-1, 128))
        codes = _unpack(weight.words, 2) | torch.stack([halves & 1, halves >> 1], 2).flatten(1) << 2
    return codes[:, : weight.shape[1]].contiguous()


def _pack(fields: Tensor, bits: int) -> Tensor:
    """uint8 [N, whole blocks] -> int16 words, each with 16 / bits fields."""
    planes = fields.unflatten(1, (-1, 16 // bits, PLANE))
    words = torch.zeros_like(planes[:, :, 0], dtype=torch.int32)
    for plane in range(16 // bits):
        words |= planes[:, :, plane].int() << bits * plane
    # Words above 32767 become negative: the same bits.
    signed: Tensor = words - (words >> 15 << 16)
    return signed.to(torch.int16).flatten(1)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`."""
    blocks = words.int().unflatten(1, (-1, 1, PLANE))
    shifts = torch.arange(0, 16, bits, device=words.device)[:, None]
    fields: Tensor = blocks >> shifts & (1 << bits) - 1
    return fields.to(torch.uint8).flatten(1)


def _lossless(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`scales` in `dtype`, or in the other 16-bit type if that is exact and `dtype` is not."""
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    stored = scales.to(dtype)
    exact = torch.equal(stored.float(), scales.float())
    return stored if exact or not torch.equal(scales.to(other).float(), scales.float()) else scales.to(other)
