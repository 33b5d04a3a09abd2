"""x W^T with x rounded to integers of 8 or 4 bits, straight from packed weights: the draft pass of QSpec.

    out^T [N, M] = s_x * sum over groups of s * (sum of q_w q_x - z * sum of q_x)

The same weights as `dequant_gemm` reads, by the byte: one mask cuts four codes out of a register, which are a fragment of the
matrix unit's 8-bit products as they stand, so that a weight costs fewer instructions than as a float (1.6 instead of 2.1 at 4
bits; groups of less than a block cost several times that). GPUs since Hopper have no products of 4 bits: integers of 4 bits
are multiplied as bytes. Products are summed exactly, in int32, within a group; all else is as in `dequant_gemm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.autotune import Config, tuner
from quantkit.kernels.gpu.matmul.dequant_gemm import Output, store_sums
from quantkit.kernels.gpu.matmul.gemm_plan import DENSE, Steps, block_rows, candidates, padded_rows
from quantkit.kernels.gpu.matmul.quantize_rows import RoundedRows, byte_fields, column_of, round_rows
from quantkit.kernels.gpu.matmul.unpack import compiled, scale_and_zero
from quantkit.kernels.layouts.planes import PlaneWeight


@triton.constexpr_function
def field_assembly(bits: int, field: int, half: int) -> str:
    """PTX that cuts field `field` of four bytes $1, as bytes, into $0; of 8 bits less 128. $2: third bits of both halves."""
    if bits == 8:
        return "xor.b32 $0, $1, 0x80808080;"
    stride = 2 if bits == 3 else bits
    code = f"shr.b32 t, $1, {stride * field}; and.b32 t, t, {((1 << stride) - 1) * 0x01010101:#010x};"
    if bits == 3:
        down = 2 * field + half - 2
        code += f"{'shr' if down > 0 else 'shl'}.b32 u, $2, {abs(down)}; and.b32 u, u, 0x04040404; or.b32 t, t, u;"
    return "{ .reg .b32 t, u; " + code + " mov.b32 $0, t; }"


@triton.jit
def field_ptx(low, third, BITS: tl.constexpr, FIELD: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """See `field`; four bytes at a time."""
    CODE: tl.constexpr = field_assembly(BITS, FIELD, HALF)
    if BITS == 3:
        return tl.inline_asm_elementwise(CODE, "=r,r,r", [low, third], tl.int8, is_pure=True, pack=4)
    return tl.inline_asm_elementwise(CODE, "=r,r", [low], tl.int8, is_pure=True, pack=4)


@triton.jit
def field(low, third, BITS: tl.constexpr, FIELD: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """One code of each byte, int8; codes of 8 bits less 128.

    Args:
        low: int8, of words; of the low two bits where BITS is 3.
        third: int8, of the third bits of a block's two halves; read only where BITS is 3.
        HALF: which half of the block `low` is of.
    """
    if BITS == 8:
        return low ^ -128
    if BITS == 3:
        return (low >> (2 * FIELD) & 3) | (third >> (2 * FIELD + HALF) & 1) << 2
    return low >> (BITS * FIELD) & ((1 << BITS) - 1)


@triton.jit
def rounded_gemm_kernel(  # type: ignore[no-untyped-def]
    x,
    sums,
    x_scales,
    words,
    third,
    grids,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    words_stride,
    third_stride,
    steps,
    steps_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BRAIN_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    LOADS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """out [split, m, n] of one block of n, one share of K and one block of m.

    Args:
        x, sums, x_scales: see `RoundedRows`.
        words, third: int8 views of those of a `PlaneWeight`, rows so many bytes apart.
        grids: see `PlaneWeight`.
        bias: [N] or None.
        out: [splits, M, N].
        steps: of the main loop, along all of K.
        BYTES: of a load, 32 a block. Of 3 bits, where a load is one block, its two halves are multiplied one after the other,
            each of 32 bytes of low bits with the same 32 of third bits.
        PARTS: groups that a load, or half, meets at most: above 1 they are multiplied one by one, which costs as much more.
        LOADS: per step.
        ASSEMBLY: cut codes out in PTX.
    """
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    FIELDS: tl.constexpr = byte_fields(BITS)
    SPAN: tl.constexpr = BYTES * FIELDS
    TILE: tl.constexpr = SPAN * HALVES
    # Rows beyond the end are read as the last one again and never stored: cheaper than masks in the loop.
    n = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    m = tl.minimum(tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    byte = tl.arange(0, BYTES)
    position = byte // 32 * (32 * FIELDS * HALVES) + byte % 32
    x_at = x + m.to(tl.int64)[:, None] * x_stride + position[None, :]
    words_at = words + n.to(tl.int64)[:, None] * words_stride + (byte // 32 * (32 * HALVES) + byte % 32)[None, :]
    third_at = third + n.to(tl.int64)[:, None] * third_stride + byte[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(1) * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, steps)):
        for load in tl.static_range(LOADS):
            tile = step * LOADS + load
            for half in tl.static_range(HALVES):
                start = tile * TILE + half * SPAN
                for part in tl.static_range(PARTS):
                    group = start // GROUP + part
                    low = tl.load(words_at + tile * (BYTES * HALVES) + 32 * half)
                    high = tl.load(third_at + tile * BYTES) if BITS == 3 else low
                    dots = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
                    for index in tl.static_range(FIELDS):
                        rows = tl.load(x_at + start + 32 * index)
                        if PARTS > 1:
                            mine = column_of(start + 32 * index + position, FIELDS) // GROUP == group
                            rows = tl.where(mine[None, :], rows, 0)
                        codes = field_ptx(low, high, BITS, index, half) if ASSEMBLY else field(low, high, BITS, index, half)
                        dots = tl.dot(codes, tl.trans(rows), dots, out_dtype=tl.int32)
                    known = tl.minimum(group, (K - 1) // GROUP)
                    scale, zero = scale_and_zero(tl.load(grids + known * N + n)[:, None], BRAIN_SCALES)
                    if BITS == 8:
                        zero -= 128
                    total = tl.load(sums + known * M + m)
                    if GROUP != SPAN or HALVES > 1:
                        # A zero point counts once, where its group begins; behind the last column a half may have none.
                        begins = (group * GROUP >= start) & (group * GROUP < start + SPAN) & (group == known)
                        total = tl.where(begins, total, 0)
                    acc += scale * (dots.to(tl.float32) - zero * total.to(tl.float32)[None, :])
    store_sums(acc * tl.load(x_scales + m)[None, :], bias, out, M, N, BLOCK_M, BLOCK_N)


def parts(group: int, span: int, columns: int) -> int:
    """Groups that `span` columns, one run of them after the other, meet at most."""
    starts = range(0, columns, span)
    return max((min(at + span, columns) - 1) // group - at // group + 1 for at in starts)


def rounded_gemm(x: RoundedRows, weight: PlaneWeight, bias: Tensor | None, dtype: torch.dtype, config: Config) -> Tensor:
    """[M, N] in `dtype`; x was rounded for this weight, config as in `gemm_plan`."""
    rows, (out_columns, columns) = len(x.codes), weight.shape
    steps = Steps.of(weight.bits, weight.group_size, columns)
    out = torch.empty(rows, out_columns, dtype=dtype, device=x.codes.device)
    output = Output.of(out, steps, config["splits"])
    words = weight.words.view(torch.int8)
    third = words if weight.third is None else weight.third.view(torch.int8)
    # Integer and float sums side by side: more rows than that would not fit the registers.
    block_m = min(block_rows(rows), 64)
    span = 2 * steps.words * byte_fields(weight.bits)
    rounded_gemm_kernel[triton.cdiv(out_columns, config["block_n"]), output.splits, triton.cdiv(rows, block_m)](
        x.codes,
        x.sums,
        x.scales,
        words,
        third,
        weight.grids,
        bias if output.splits == 1 else None,
        output.partial,
        rows,
        out_columns,
        columns,
        x.codes.stride(0),
        words.stride(0),
        third.stride(0),
        steps.count,
        output.steps_per_split,
        BITS=weight.bits,
        GROUP=weight.group_size,
        BRAIN_SCALES=weight.scale_type == torch.bfloat16,
        BLOCK_M=block_m,
        BLOCK_N=config["block_n"],
        BYTES=2 * steps.words,
        PARTS=parts(weight.group_size, span, columns),
        LOADS=steps.loads,
        ASSEMBLY=compiled(),
        num_warps=config["warps"],
        num_stages=config["stages"],
    )
    return output.add_up(bias)


def w4a8_matmul(x: Tensor, weight: PlaneWeight, activation_bits: int, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with every row of x rounded to integers (see `reference.w4a8_matmul`).

    Args:
        x: [M, K], float16, bfloat16 or float32, finite, on the current CUDA device (any device under Triton's interpreter).
        weight: of shape (N, K), on the same device.
        activation_bits: 4 or 8.
        bias: floating [N], or None.

    Returns:
        [M, N] in x's dtype; sums within a group are exact, those over groups float32 in a fixed order.
    """
    assert x.ndim == 2, x.shape
    assert x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    assert activation_bits in (4, 8), activation_bits
    assert x.device == weight.device, (x.device, weight.device)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    x = x if x.stride(1) == 1 else x.contiguous()
    rounded = round_rows(x, activation_bits, weight.bits, weight.group_size)

    def run(config: Config) -> Tensor:
        return rounded_gemm(rounded, weight, bias, x.dtype, config)

    rows = padded_rows(x.shape[0])
    configs = [each for each in candidates(weight.bits, weight.group_size, weight.shape, rows, x.device) if each != DENSE]
    problem = weight.bits, weight.group_size, *weight.shape, rows, x.dtype
    return run(tuner(x.device).best("rounded_matmul", problem, configs, run))
