"""x W^T with x quantized to 8- or 4-bit integers, straight from packed weights: the draft pass of QSpec.

    out^T [N, M] = s_x * sum over groups of s * (sum of q_w q_x - z * sum of q_x)

The kernel reads the same weights as `dequant_gemm`, byte by byte. One mask extracts four codes from a register, and these are
already a fragment of the matrix units' 8-bit products. So a weight costs fewer instructions than in floating point (1.6
instead of 2.1 at 4 bits), except that groups smaller than a block cost several times as much. GPUs since Hopper have no 4-bit
products: 4-bit integers are multiplied as bytes. Within a group, products are summed exactly, in int32; all else is as in
`dequant_gemm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.autotune import Config, tuner
from quantkit.kernels.gpu.matmul.gemm_plan import DENSE, Steps, block_rows, candidates, padded_rows
from quantkit.kernels.gpu.matmul.quantize_rows import QuantizedRows, codes_per_byte, column_of, quantize_rows
from quantkit.kernels.gpu.matmul.split_k import launch_gemm, store_tile
from quantkit.kernels.gpu.matmul.unpack import scale_and_zero
from quantkit.kernels.layouts.planes import PlaneWeight


@triton.constexpr_function
def extract_assembly(bits: int, field: int, half: int) -> str:
    """PTX that extracts field `field` of the four bytes in $1, as bytes in $0. 8-bit codes come out minus 128.

    $2 holds the third bits of both halves of a block, read for 3 bits only.
    """
    if bits == 8:
        return "xor.b32 $0, $1, 0x80808080;"
    stride = 2 if bits == 3 else bits
    code = f"shr.b32 t, $1, {stride * field}; and.b32 t, t, {((1 << stride) - 1) * 0x01010101:#010x};"
    if bits == 3:
        down = 2 * field + half - 2
        code += f"{'shr' if down > 0 else 'shl'}.b32 u, $2, {abs(down)}; and.b32 u, u, 0x04040404; or.b32 t, t, u;"
    return "{ .reg .b32 t, u; " + code + " mov.b32 $0, t; }"


@triton.jit
def extract_ptx(low, high_bits, BITS: tl.constexpr, FIELD: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """`extract_code` in PTX, four bytes at a time."""
    CODE: tl.constexpr = extract_assembly(BITS, FIELD, HALF)
    if BITS == 3:
        return tl.inline_asm_elementwise(CODE, "=r,r,r", [low, high_bits], tl.int8, is_pure=True, pack=4)
    return tl.inline_asm_elementwise(CODE, "=r,r", [low], tl.int8, is_pure=True, pack=4)


@triton.jit
def extract_code(low, high_bits, BITS: tl.constexpr, FIELD: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """One code per byte, int8; 8-bit codes come out minus 128.

    Args:
        low: int8, bytes of the words; for 3 bits, of the words of low bits.
        high_bits: int8, bytes of the third bits of a block's two halves; read for 3 bits only.
        FIELD: which code of the byte.
        HALF: which half of the block `low` belongs to.
    """
    if BITS == 8:
        return low ^ -128
    if BITS == 3:
        return (low >> (2 * FIELD) & 3) | (high_bits >> (2 * FIELD + HALF) & 1) << 2
    return low >> (BITS * FIELD) & ((1 << BITS) - 1)


@triton.jit
def w4a8_gemm_kernel(  # type: ignore[no-untyped-def]
    x,
    sums,
    x_scales,
    words,
    high_bits,
    qparams,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    words_stride,
    high_bits_stride,
    steps,
    steps_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BF16_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS_PER_LOAD: tl.constexpr,
    LOADS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """out [split, m, n] of one block of n, one split of K and one block of m.

    Args:
        x, sums, x_scales: see `QuantizedRows`.
        words, high_bits: int8 views of those of a `PlaneWeight`; the strides are in bytes.
        qparams: see `PlaneWeight`.
        bias: [N] or None.
        out: [splits, M, N].
        steps: number of steps of the main loop over all of K.
        BYTES: per load and row, 32 per block. For 3 bits a load is one block, whose two halves are multiplied one after the
            other: 32 bytes of low bits each, with the same 32 bytes of third bits.
        GROUPS_PER_LOAD: the most groups that a load, or half, overlaps. If above 1, the load is multiplied once per group,
            with the other groups masked, which costs that many times as much.
        LOADS: loads per step.
        ASSEMBLY: extract codes in PTX.
    """
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    FIELDS: tl.constexpr = codes_per_byte(BITS)
    SPAN: tl.constexpr = BYTES * FIELDS
    TILE: tl.constexpr = SPAN * HALVES
    # Rows past the end read the last row and are never stored: cheaper than masks in the loop.
    n = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    m = tl.minimum(tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    byte = tl.arange(0, BYTES)
    position = byte // 32 * (32 * FIELDS * HALVES) + byte % 32
    x_at = x + m.to(tl.int64)[:, None] * x_stride + position[None, :]
    words_at = words + n.to(tl.int64)[:, None] * words_stride + (byte // 32 * (32 * HALVES) + byte % 32)[None, :]
    high_bits_at = high_bits + n.to(tl.int64)[:, None] * high_bits_stride + byte[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(1) * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, steps)):
        for load in tl.static_range(LOADS):
            tile = step * LOADS + load
            for half in tl.static_range(HALVES):
                start = tile * TILE + half * SPAN
                for part in tl.static_range(GROUPS_PER_LOAD):
                    group = start // GROUP + part
                    low = tl.load(words_at + tile * (BYTES * HALVES) + 32 * half)
                    high = tl.load(high_bits_at + tile * BYTES) if BITS == 3 else low
                    dots = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
                    for index in tl.static_range(FIELDS):
                        rows = tl.load(x_at + start + 32 * index)
                        if GROUPS_PER_LOAD > 1:
                            mine = column_of(start + 32 * index + position, FIELDS) // GROUP == group
                            rows = tl.where(mine[None, :], rows, 0)
                        codes = (
                            extract_ptx(low, high, BITS, index, half)
                            if ASSEMBLY
                            else extract_code(low, high, BITS, index, half)
                        )
                        dots = tl.dot(codes, tl.trans(rows), dots, out_dtype=tl.int32)
                    valid_group = tl.minimum(group, (K - 1) // GROUP)
                    scale, zero = scale_and_zero(tl.load(qparams + valid_group * N + n)[:, None], BF16_SCALES)
                    if BITS == 8:
                        zero -= 128
                    total = tl.load(sums + valid_group * M + m)
                    if GROUP != SPAN or HALVES > 1:
                        # A zero point counts once, where its group begins. Past the last column, a half may contain no group.
                        begins = (group * GROUP >= start) & (group * GROUP < start + SPAN) & (group == valid_group)
                        total = tl.where(begins, total, 0)
                    acc += scale * (dots.to(tl.float32) - zero * total.to(tl.float32)[None, :])
    store_tile(acc * tl.load(x_scales + m)[None, :], bias, out, M, N, BLOCK_M, BLOCK_N)


def groups_per_load(group: int, span: int, columns: int) -> int:
    """The most groups that any of the consecutive runs of `span` columns overlaps."""
    starts = range(0, columns, span)
    return max((min(at + span, columns) - 1) // group - at // group + 1 for at in starts)


def w4a8_gemm(x: QuantizedRows, weight: PlaneWeight, bias: Tensor | None, dtype: torch.dtype, config: Config) -> Tensor:
    """[M, N] in `dtype`; x was quantized for this weight; config as in `gemm_plan`."""
    rows, (out_columns, columns) = len(x.codes), weight.shape
    steps = Steps.of(weight.bits, weight.group_size, columns)
    words = weight.words.view(torch.int8)
    high_bits = words if weight.high_bits is None else weight.high_bits.view(torch.int8)
    span = 2 * steps.words * codes_per_byte(weight.bits)
    return launch_gemm(
        w4a8_gemm_kernel,
        (x.codes, x.sums, x.scales),
        (words, high_bits),
        weight,
        bias,
        torch.empty(rows, out_columns, dtype=dtype, device=x.codes.device),
        config,
        steps,
        # The kernel keeps integer and float sums: with more rows they would not fit into the registers.
        min(block_rows(rows), 64),
        BYTES=2 * steps.words,
        GROUPS_PER_LOAD=groups_per_load(weight.group_size, span, columns),
    )


def w4a8_matmul(x: Tensor, weight: PlaneWeight, activation_bits: int, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, with every row of x quantized to integers (see `reference.w4a8_matmul`).

    Args:
        x: [M, K], float16, bfloat16 or float32, finite, on the current CUDA device (any device under Triton's interpreter).
        weight: of shape (N, K), on the same device.
        activation_bits: 4 or 8.
        bias: floating [N], or None.

    Returns:
        [M, N] in x's dtype. Sums within a group are exact; sums over groups are float32, in a fixed order.
    """
    assert x.ndim == 2, x.shape
    assert x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    assert activation_bits in (4, 8), activation_bits
    assert x.device == weight.device, (x.device, weight.device)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    x = x if x.stride(1) == 1 else x.contiguous()
    quantized = quantize_rows(x, activation_bits, weight.bits, weight.group_size)

    def run(config: Config) -> Tensor:
        return w4a8_gemm(quantized, weight, bias, x.dtype, config)

    rows = padded_rows(x.shape[0])
    configs = [each for each in candidates(weight.bits, weight.group_size, weight.shape, rows, x.device) if each != DENSE]
    problem = weight.bits, weight.group_size, *weight.shape, rows, x.dtype
    return run(tuner(x.device).best("w4a8_matmul", problem, configs, run))
