"""Matrix products on a CPU: by our native kernels if there is a C compiler, else by torch's.

The native kernels accumulate in float32 for all types of weights and inputs. A row's result depends neither on the other rows
of the call nor on the number of threads. Where the processor multiplies bfloat16, inputs of bfloat16 weights are rounded to
bfloat16. Packed weights are multiplied without dequantizing them (W4A16): per group, the sum
of codes times inputs, minus the zero point times the sum of inputs, times the scale. For that, inputs are quantized to 16-bit
integers relative to the largest of their group (csrc/packed_input.c), and sums within a group are exact.
"""

from ctypes import CDLL, byref, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.kernels import reference
from quantkit.kernels.cpu import library, structs

#: Rows of a packed weight that are interleaved (TILE in matrix.h).
_TILE = 32


@dataclass(frozen=True)
class CpuWeight:
    """A weight [N, K] in the layout that its kernel reads.

    Attributes:
        layout: "dense": `data` [N, K] in float32, bfloat16 or float16, as it was given;
            "tiles": packed for the native kernels (matrix.h describes the arrays); `scales` are float16 if that is exact, else
            float32; `zeros` is None if all zero points equal `zero`;
            "int4": packed by torch; `scales` bfloat16 [G, N, 2] hold scale and 0, `zeros` float32 [N, G] hold (8 - zero) *
            scale; "codes": `data` uint8 [N, K], `scales` float32 [N, G], `zeros` uint8 [N, G].
        shape: (N, K).
        bits: bits per stored code; 0 for dense.
        group_size: columns that share a scale; K for dense.
        data, scales, zeros, zero: see layout.
    """

    layout: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    data: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    zero: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the weight that a product reads."""
        return sum(tensor.nbytes for tensor in (self.data, self.scales, self.zeros) if tensor is not None)

    def matrix(
        self, bias: Tensor | None = None, activation_bits: int = 0, column_perm: Tensor | None = None
    ) -> structs.Matrix:
        """The weight as the native kernels take it. It holds addresses only: the caller keeps all tensors alive.

        Args:
            bias: float32 [N] or None.
            activation_bits: 4 or 8: quantize inputs to that many bits (see `reference.w4a8_matmul`), for "tiles" only; 0: do
                not.
            column_perm: int32 [K], the column of x that each column of W multiplies, for "tiles" only; None: the same column.
        """
        assert self.layout in ("dense", "tiles"), self.layout
        assert self.layout == "tiles" or (not activation_bits and column_perm is None)
        return structs.Matrix(
            data=structs.address(self.data),
            scales=structs.address(self.scales),
            zeros=structs.address(self.zeros),
            bias=structs.address(bias),
            column_perm=structs.address(column_perm),
            rows=self.shape[0],
            columns=self.shape[1],
            group=self.group_size,
            bits=self.bits,
            type=structs.TYPES[(self.data if self.scales is None else self.scales).dtype],
            activation_bits=activation_bits,
            zero=self.zero,
        )


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int) -> CpuWeight:
    """Repack a quantized matrix for `matmul`.

    Args:
        codes: uint8 [N, K], below 2^bits.
        scales: float32 [N, G].
        zeros: uint8 [N, G].
        bits: 2, 3, 4 or 8; 3-bit codes are stored in 4.
        group_size: K / G; -1 for one group per row.
    """
    rows, columns = codes.shape
    group = columns if group_size == -1 else group_size
    assert columns % group == 0, f"group size {group} does not divide {columns}"
    assert scales.shape == zeros.shape == (rows, columns // group)
    codes = codes.contiguous()
    scales = scales.float().contiguous()
    zeros = zeros.to(torch.uint8).contiguous()
    stored = 4 if bits == 3 else bits
    lib = library.load()
    if lib is not None:
        return _tiles(lib, codes, scales, zeros, stored, group)
    if stored == 4 and rows % 16 == 0 and group in (32, 64, 128, 256):
        offsets = (8.0 - zeros.float()) * scales
        both = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
        data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return CpuWeight("int4", (rows, columns), stored, group, data, both, offsets)
    return CpuWeight("codes", (rows, columns), stored, group, codes, scales, zeros)


def _tiles(lib: CDLL, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int) -> CpuWeight:
    rows, columns = codes.shape
    groups, tiles = columns // group, -(-rows // _TILE)
    data = torch.empty(tiles, groups, -(-group // (32 // bits)), _TILE, dtype=torch.int32)
    exact = bool((scales.half().float() == scales).all()) and bool(scales.isfinite().all())
    tiled_scales = torch.empty(tiles, groups, _TILE, dtype=torch.float16 if exact else torch.float32)
    zero = int(zeros.view(-1)[0])
    tiled_zeros = None if bool((zeros == zero).all()) else torch.zeros(tiles, -(-groups // 4), _TILE, dtype=torch.int32)
    weight = CpuWeight("tiles", (rows, columns), bits, group, data, tiled_scales, tiled_zeros, zero)
    lib.quantkit_pack(
        byref(weight.matrix()),
        c_void_p(codes.data_ptr()),
        c_void_p(scales.data_ptr()),
        c_void_p(zeros.data_ptr()),
        library.threads(),
    )
    return weight


def pack_dense(weight: Tensor) -> CpuWeight:
    """A dense weight [N, K] in float32, bfloat16 or float16. It is not copied if contiguous, so it may be mapped from a
    file.
    """
    assert weight.dtype in structs.TYPES, weight.dtype
    rows, columns = weight.shape
    return CpuWeight("dense", (rows, columns), 0, columns, weight.contiguous())


def dequantize(weight: CpuWeight, first: int = 0, last: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows first .. last-1 (all by default) with the values that products use: [rows, K] in float32 or bfloat16.

    In the "int4" layout, scales are rounded to bfloat16, and so are products.
    """
    last = weight.shape[0] if last is None else last
    if weight.layout == "tiles":
        lib = library.load()
        assert lib is not None
        out = torch.empty(last - first, weight.shape[1], dtype=dtype)
        lib.quantkit_dequantize(
            byref(weight.matrix()),
            c_int64(first),
            c_int64(last - first),
            structs.TYPES[dtype],
            c_void_p(out.data_ptr()),
            library.threads(),
        )
        return out
    if weight.layout == "int4":
        return _int4_matmul(torch.eye(weight.shape[1]), weight).T[first:last].to(dtype).contiguous()
    rows = weight.data[first:last]
    if weight.layout == "dense":
        return rows.to(dtype)
    assert weight.scales is not None
    assert weight.zeros is not None
    return reference.dequantize(rows, weight.scales[first:last], weight.zeros[first:last], weight.group_size).to(dtype)


def matmul(x: Tensor, weight: CpuWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias.

    Args:
        x: [M, K] in float32, bfloat16 or float16.
        weight: from `pack` or `pack_dense`.
        bias: [N] in any floating type.

    Returns:
        [M, N] in x's dtype, accumulated in float32. The native kernels round inputs for packed weights, by at most 2^-15.99 of
        the largest of their group, and for bfloat16 weights where the processor multiplies bfloat16; a row that holds NaN or
        infinity gives NaN. Without them, torch rounds inputs to the type of a dense weight, and to bfloat16 for "int4".
    """
    assert x.shape[1] == weight.shape[1], f"{tuple(x.shape)} against {weight.shape}"
    lib = library.load()
    if lib is not None and weight.layout in ("dense", "tiles"):
        return native_matmul(lib, x, weight, bias)
    if weight.layout == "int4":
        out = _int4_matmul(x, weight)
    elif weight.layout == "dense":
        out = linear(x.to(weight.data.dtype), weight.data)
    else:
        out = linear(x.float(), dequantize(weight))
    return out.to(x.dtype) if bias is None else (out + bias).to(x.dtype)


def native_matmul(lib: CDLL, x: Tensor, weight: CpuWeight, bias: Tensor | None, activation_bits: int = 0) -> Tensor:
    """`matmul` by the native kernels, for the layouts "dense" and "tiles"; `activation_bits` as for `CpuWeight.matrix`."""
    wide = x.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    matrix = byref(weight.matrix(bias, activation_bits))
    prepared = torch.empty(len(wide) * lib.quantkit_prepared_floats(matrix))
    out = torch.empty(len(wide), weight.shape[0])
    lib.quantkit_matmul(
        matrix,
        c_void_p(wide.data_ptr()),
        c_int64(len(wide)),
        c_void_p(prepared.data_ptr()),
        c_void_p(out.data_ptr()),
        library.threads(),
    )
    return out.to(x.dtype)


def _int4_matmul(x: Tensor, weight: CpuWeight) -> Tensor:
    """torch's int4 product supports only the zero point 8; the remainder of each zero point is added in float32."""
    assert weight.scales is not None
    assert weight.zeros is not None
    half, group = x.to(torch.bfloat16).contiguous(), weight.group_size
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(half, weight.data, group, weight.scales)
    sums: Tensor = half.float().unflatten(1, (-1, group)).sum(-1)
    return out.float() + sums @ weight.zeros.T
