"""Unpacks planes of codes to q - z inside a kernel: in PTX, and in plain Triton, which computes the same.

A float whose mantissa ends in a code is a power of two plus that code: 0x6400 | q is 1024 + q in float16, and 0x4300 | q is
128 + q in bfloat16. So one lop3 (mask, then OR) and one addition of -(power + z) give q - z for two codes at once, exactly. A
field that is r bits above the lowest mantissa bit is read in place, with the power 2^(mantissa - r). A field beyond the
mantissa is shifted down first; one shift serves several fields. Triton does not find this by itself: it needs 4 to 5
instructions per weight, where this takes a little more than one. (The trick is from FasterTransformer, arXiv 2211.10017.)
"""

import triton
import triton.language as tl


@triton.constexpr_function
def plane_count(bits: int) -> int:
    """Planes of 16 columns in a block."""
    return 16 if bits == 3 else 16 // bits


@triton.constexpr_function
def field_position(bits: int, plane: int, mantissa: int) -> tuple[int, int]:
    """(how far to shift a word down, the bit at which the plane's field then starts), so that it is within the mantissa."""
    stride = 2 if bits == 3 else bits
    field = plane % (16 // stride)
    fields = max(1, (mantissa - bits) // stride + 1)  # how many fields one shift brings into the mantissa
    return stride * fields * (field // fields), stride * (field % fields)


@triton.constexpr_function
def magic_offset(bits: int, plane: int, mantissa: int) -> int:
    """The power of two to subtract from a plane's unpacked codes, in addition to z; 0 if the assembly subtracts it."""
    return 0 if bits > mantissa else 1 << (mantissa - field_position(bits, plane, mantissa)[1])


@triton.constexpr_function
def unpack_assembly(bits: int, plane: int, mantissa: int) -> str:
    """PTX that unpacks two codes of a plane, in registers of two 16-bit lanes.

    $0 is q - z, in float16 (10 bits of mantissa) or bfloat16 (7 bits); $1 are the words; $2 is -(power + z); $3 are third
    bits.
    """
    down, at = field_position(bits, plane, mantissa)
    field = ((1 << (2 if bits == 3 else bits)) - 1) << at
    magic = (25 - at) << 10 if mantissa == 10 else (134 - at) << 7
    add = "add.rn.f16x2 {0}, {1}, {2};" if mantissa == 10 else "fma.rn.bf16x2 {0}, {1}, one, {2};"
    code = ["mov.b32 one, 0x3f803f80;"] if mantissa == 7 else []
    code += [f"shr.b32 t, $1, {down};"]
    if bits > mantissa:
        # 128 + the low 7 bits, and 128 or 256 for the top bit: (128 + low - z) + (top - 256) never exceeds +-256.
        code += ["lop3.b32 u, t, 0x007f007f, 0x43004300, 0xea;", "lop3.b32 t, t, 0x00800080, 0x43004300, 0xea;"]
        code += ["mov.b32 v, 0xc380c380;"]
        code += [add.format("u", "u", "$2"), add.format("t", "t", "v"), add.format("$0", "t", "u")]
    else:
        code += [f"lop3.b32 t, t, {field * 0x10001:#010x}, {magic * 0x10001:#010x}, 0xea;"]
        if bits == 3:
            up = at + 2 - (2 * (plane % 8) + plane // 8)
            code += [f"{'shl' if up > 0 else 'shr'}.b32 u, $3, {abs(up)};"]
            code += [f"lop3.b32 t, u, {(4 << at) * 0x10001:#010x}, t, 0xea;"]
        code += [add.format("$0", "t", "$2")]
    return "{ .reg .b32 t, u, v, one; " + " ".join(code) + " }"


@triton.jit
def unpack_ptx(words, high_bits, zero, PLANE: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`unpack` in PTX; TYPE is float16 or bfloat16."""
    MANTISSA: tl.constexpr = TYPE.fp_mantissa_width
    offset = (-magic_offset(BITS, PLANE, MANTISSA) - zero).to(TYPE)
    CODE: tl.constexpr = unpack_assembly(BITS, PLANE, MANTISSA)
    if BITS == 3:
        return tl.inline_asm_elementwise(CODE, "=r,r,r,r", [words, offset, high_bits], offset.dtype, is_pure=True, pack=2)
    return tl.inline_asm_elementwise(CODE, "=r,r,r", [words, offset], offset.dtype, is_pure=True, pack=2)


@triton.jit
def unpack(words, high_bits, zero, PLANE: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """q - z of one plane, as TYPE.

    Args:
        words: int16, the codes; for 3 bits, their low two bits.
        high_bits: int16 like `words`, the third bits; read for 3 bits only.
        zero: float32 z, broadcast to the words.
        PLANE: which plane of the block.
    """
    if BITS == 3:
        code = (words >> (2 * (PLANE % 8)) & 3) | (high_bits >> (2 * (PLANE % 8) + PLANE // 8) & 1) << 2
    else:
        code = words >> (BITS * PLANE) & ((1 << BITS) - 1)
    return (code.to(tl.float32) - zero).to(TYPE)


@triton.jit
def scale_and_zero(qparams, BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 s and z, from int32 words that hold s in the lower half and z in the upper: bfloat16 if BF16, else float16."""
    if BF16:
        return (qparams << 16).to(tl.float32, bitcast=True), (qparams & -65536).to(tl.float32, bitcast=True)
    scale = qparams.to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), (qparams >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
